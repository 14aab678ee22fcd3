"""Mutants of SQL: mistakes that a model makes. Most return something else; some do not, on some data or on any."""

import random
from collections.abc import Callable, Iterator

from instances import Schema, Table
from rewrites import aggregates, conjuncts, declared, parse, set_where, source_of, table_of
from sqlglot import exp

# A mutation yields changed trees: it changes the one it is given, and takes that back when it is asked for the next.
Mutation = Callable[[exp.Select, Schema, random.Random], Iterator[None]]
KINDS: dict[str, Mutation] = {}

FLIPPED = {exp.GT: exp.LT, exp.LT: exp.GT, exp.GTE: exp.LTE, exp.LTE: exp.GTE, exp.EQ: exp.NEQ, exp.NEQ: exp.EQ}
BOUNDED = {exp.GT: exp.GTE, exp.LT: exp.LTE, exp.GTE: exp.GT, exp.LTE: exp.LT}
AGGREGATES = (exp.Count, exp.Sum, exp.Avg, exp.Min, exp.Max)


def mutants(sql: str, schema: Schema, most: int = 2) -> Iterator[tuple[str, str]]:
    """Yield up to `most` mutants of each kind of a SELECT, the same ones every time."""
    tree = parse(sql, schema)
    if tree is None:
        return
    original, seen = tree.sql("sqlite"), set()
    for kind, mutation in KINDS.items():
        rng = random.Random(f"{kind} {sql}")
        made = []
        for _ in mutation(tree, schema, rng):
            text = tree.sql("sqlite")
            if text != original and text not in seen:
                seen.add(text)
                made.append(text)
        yield from ((kind, text) for text in rng.sample(made, min(most, len(made))))


def kind(mutation: Mutation) -> Mutation:
    """List a mutation under its name."""
    KINDS[mutation.__name__] = mutation
    return mutation


def replaced(node: exp.Expr, others: list[exp.Expr]) -> Iterator[None]:
    """Put each of the others in the node's place for a while."""
    for other in others:
        node.replace(other)
        yield
        other.replace(node)


def changed(node: exp.Expr, part: str, value: object) -> Iterator[None]:
    """Give one part of a node another value for a while."""
    before = node.args.get(part)
    node.set(part, value)
    yield
    node.set(part, before)


def _columns(node: exp.Expr | None) -> list[exp.Column]:
    return [each for each in node.find_all(exp.Column) if isinstance(each.this, exp.Identifier)] if node else []


def _other_columns(column: exp.Column, schema: Schema, rng: random.Random) -> list[exp.Expr]:
    """Columns of the same table in its place."""
    table = table_of(source_of(column, schema), schema)
    others = [each for each in table.columns if each != column.name.lower()] if table else []
    return [exp.column(other, table=column.table or None) for other in rng.sample(others, min(2, len(others)))]


@kind
def output_column(tree: exp.Select, schema: Schema, rng: random.Random) -> Iterator[None]:
    for item in tree.expressions:
        for column in _columns(item):
            yield from replaced(column, _other_columns(column, schema, rng))


@kind
def condition_column(tree: exp.Select, schema: Schema, rng: random.Random) -> Iterator[None]:
    for where in list(tree.find_all(exp.Where)):
        for column in _columns(where):
            yield from replaced(column, _other_columns(column, schema, rng))


@kind
def misspelled_column(tree: exp.Select, schema: Schema, rng: random.Random) -> Iterator[None]:
    for column in _columns(tree):
        yield from changed(column, "this", exp.to_identifier(f"{column.name}_x"))


@kind
def aggregate(tree: exp.Select, schema: Schema, rng: random.Random) -> Iterator[None]:
    for node in list(tree.find_all(*AGGREGATES)):
        if isinstance(node.this, exp.Column):
            others = [other for other in AGGREGATES if not isinstance(node, other)]
            yield from replaced(node, [other(this=node.this.copy()) for other in others])


@kind
def aggregate_lost(tree: exp.Select, schema: Schema, rng: random.Random) -> Iterator[None]:
    for node in aggregates(tree):
        if isinstance(node.this, exp.Column):
            yield from replaced(node, [node.this.copy()])


@kind
def condition_dropped(tree: exp.Select, schema: Schema, rng: random.Random) -> Iterator[None]:
    for select in list(tree.find_all(exp.Select)):
        where = select.args.get("where")
        conditions = conjuncts(where)
        for dropped in conditions:
            set_where(select, [each for each in conditions if each is not dropped])
            yield
            select.set("where", where)


@kind
def comparison_flipped(tree: exp.Select, schema: Schema, rng: random.Random) -> Iterator[None]:
    for node in list(tree.find_all(*FLIPPED)):
        yield from replaced(node, [FLIPPED[type(node)](this=node.this.copy(), expression=node.expression.copy())])


@kind
def bound_moved(tree: exp.Select, schema: Schema, rng: random.Random) -> Iterator[None]:
    for node in list(tree.find_all(*BOUNDED)):
        yield from replaced(node, [BOUNDED[type(node)](this=node.this.copy(), expression=node.expression.copy())])


@kind
def literal(tree: exp.Select, schema: Schema, rng: random.Random) -> Iterator[None]:
    """Another value of the column beside it, or a number one off."""
    for node in list(tree.find_all(exp.Literal)):
        if isinstance(node.parent, exp.Limit | exp.Group):
            continue
        if node.is_string:
            columns = [each for each in _columns(node.parent) if declared(each, schema)]
            owner = table_of(source_of(columns[0], schema), schema) if columns else None
            values = schema.values[owner.name.lower(), columns[0].name.lower()] if owner else []
            others = [value for value in values if str(value) != node.name]
            chosen = [exp.Literal.string(value) for value in rng.sample(others, min(2, len(others)))]
        else:
            near = (float(node.name) + step for step in (1, -1))
            chosen = [exp.Literal.number(f"{value:.15g}") for value in near if value >= 0]
        yield from replaced(node, chosen)


@kind
def negation(tree: exp.Select, schema: Schema, rng: random.Random) -> Iterator[None]:
    for node in list(tree.find_all(exp.In, exp.Exists, exp.Is, exp.Between, exp.Like)):
        outer = node.parent if isinstance(node.parent, exp.Not) else node
        yield from replaced(outer, [node.copy() if outer is not node else exp.not_(node.copy())])


@kind
def and_to_or(tree: exp.Select, schema: Schema, rng: random.Random) -> Iterator[None]:
    for node in list(tree.find_all(exp.And)):
        other = exp.Or(this=node.left.copy(), expression=node.right.copy())
        yield from replaced(node, [exp.paren(other)])


@kind
def distinct(tree: exp.Select, schema: Schema, rng: random.Random) -> Iterator[None]:
    yield from changed(tree, "distinct", None if tree.args.get("distinct") else exp.Distinct())


@kind
def direction(tree: exp.Select, schema: Schema, rng: random.Random) -> Iterator[None]:
    for node in list(tree.find_all(exp.Ordered)):
        down = not node.args.get("desc")
        yield from replaced(node, [exp.Ordered(this=node.this.copy(), desc=down, nulls_first=not down)])


@kind
def order_dropped(tree: exp.Select, schema: Schema, rng: random.Random) -> Iterator[None]:
    if tree.args.get("order"):
        yield from changed(tree, "order", None)


@kind
def limit(tree: exp.Select, schema: Schema, rng: random.Random) -> Iterator[None]:
    """One row more or less; a LIMIT where there was none."""
    found = tree.args.get("limit")
    sizes = [int(found.expression.name) + 1, int(found.expression.name) - 1] if found else [1]
    for size in sizes:
        yield from changed(tree, "limit", exp.Limit(expression=exp.Literal.number(size)))


@kind
def limit_dropped(tree: exp.Select, schema: Schema, rng: random.Random) -> Iterator[None]:
    if tree.args.get("limit"):
        yield from changed(tree, "limit", None)


@kind
def join_column(tree: exp.Select, schema: Schema, rng: random.Random) -> Iterator[None]:
    for join in list(tree.find_all(exp.Join)):
        for column in _columns(join.args.get("on")):
            yield from replaced(column, _other_columns(column, schema, rng))


@kind
def join_condition_dropped(tree: exp.Select, schema: Schema, rng: random.Random) -> Iterator[None]:
    for join in list(tree.find_all(exp.Join)):
        if join.args.get("on"):
            yield from changed(join, "on", None)


@kind
def join_type(tree: exp.Select, schema: Schema, rng: random.Random) -> Iterator[None]:
    for join in list(tree.find_all(exp.Join)):
        if join.args.get("on"):
            yield from changed(join, "side", None if join.side else "LEFT")


@kind
def table(tree: exp.Select, schema: Schema, rng: random.Random) -> Iterator[None]:
    """Another table of the database, preferably one that has the columns; a name that no table has."""
    for node in list(tree.find_all(exp.Table)):
        names = {column.name.lower() for column in _columns(tree)}
        others = [each for key, each in schema.tables.items() if key != node.name.lower()]
        fitting = [each for each in others if names <= set(each.columns)] or others
        chosen: list[Table] = rng.sample(fitting, min(1, len(fitting)))
        for name in [*(each.name for each in chosen), f"{node.name}s"]:
            yield from changed(node, "this", exp.to_identifier(name))


@kind
def group_dropped(tree: exp.Select, schema: Schema, rng: random.Random) -> Iterator[None]:
    for select in list(tree.find_all(exp.Select)):
        if select.args.get("group"):
            yield from changed(select, "group", None)


@kind
def group_column(tree: exp.Select, schema: Schema, rng: random.Random) -> Iterator[None]:
    for group in list(tree.find_all(exp.Group)):
        for column in _columns(group):
            yield from replaced(column, _other_columns(column, schema, rng))


@kind
def having_dropped(tree: exp.Select, schema: Schema, rng: random.Random) -> Iterator[None]:
    for select in list(tree.find_all(exp.Select)):
        if select.args.get("having"):
            yield from changed(select, "having", None)


@kind
def output_lost(tree: exp.Select, schema: Schema, rng: random.Random) -> Iterator[None]:
    items = tree.expressions
    for place in range(len(items)) if len(items) > 1 else ():
        yield from changed(tree, "expressions", items[:place] + items[place + 1 :])

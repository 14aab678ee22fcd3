"""Rewrites of SQL that return the same on every database of the schema: what no verifier may ever call wrong.

"The same" allows for NULLs, duplicates, empty tables, and ties. Keys and NOT NULL count only where the schema declares
them; collations but BINARY, and blobs in columns of text, are not thought of. Two kinds return something else, the same
columns in another order and one of them twice: `PERMUTED` and `ADDED`.
"""

from collections.abc import Callable, Iterator

import sqlglot
from instances import Column, Schema, Table
from sqlglot import exp

PERMUTED, ADDED = "columns_permuted", "column_added"

Rewrite = Callable[[exp.Select, Schema], exp.Expr | str | None]
KINDS: dict[str, Rewrite] = {}

NEGATIONS = {exp.GT: exp.LTE, exp.LTE: exp.GT, exp.LT: exp.GTE, exp.GTE: exp.LT, exp.EQ: exp.NEQ, exp.NEQ: exp.EQ}
FLIPS = {exp.GT: exp.LT, exp.LT: exp.GT, exp.GTE: exp.LTE, exp.LTE: exp.GTE, exp.EQ: exp.EQ, exp.NEQ: exp.NEQ}


def rewrites(sql: str, schema: Schema) -> Iterator[tuple[str, str]]:
    """Yield each kind of rewrite that applies to a SELECT, with its SQL."""
    tree = parse(sql, schema)
    if tree is None:
        return
    for kind, rewrite in KINDS.items():
        if (made := rewrite(tree.copy(), schema)) is not None:
            text = made if isinstance(made, str) else made.sql("sqlite")
            if text != sql:
                yield kind, text


def parse(sql: str, schema: Schema) -> exp.Select | None:
    """Parse a SELECT from tables of the schema; `None` where it is something else.

    Names in double quotes that no table has are the strings that SQLite takes them for.
    """
    tree = sqlglot.parse_one(sql, read="sqlite")
    if not isinstance(tree, exp.Select) or any(
        table.name.lower() not in schema.tables for table in tree.find_all(exp.Table)
    ):
        return None
    known = {name for table in schema.tables.values() for name in table.columns}
    for column in list(tree.find_all(exp.Column)):
        if column.this.args.get("quoted") and not column.table and column.name.lower() not in known:
            column.replace(exp.Literal.string(column.name))
    return tree


def kind(rewrite: Rewrite) -> Rewrite:
    """List a rewrite under its name. It may change the tree it is given, and returns `None` where it does not apply."""
    KINDS[rewrite.__name__] = rewrite
    return rewrite


# What a tree is about


def sources(select: exp.Select) -> list[exp.Expr]:
    """The tables and derived tables that a SELECT reads, in order."""
    start = select.args.get("from_")
    return [each.this for each in ([start] if start else []) + (select.args.get("joins") or [])]


def source_of(column: exp.Column, schema: Schema) -> exp.Expr | None:
    """The table or derived table that a column belongs to; `None` for a name that the SELECT list gives."""
    select = column.find_ancestor(exp.Select)
    while select:
        for source in sources(select):
            if column.table:
                found = source.alias_or_name.lower() == column.table.lower()
            elif isinstance(source, exp.Table):
                found = column.name.lower() in schema.tables[source.name.lower()].columns
            else:
                found = column.name.lower() in {name.lower() for name in source.this.named_selects}
            if found:
                return source
        select = select.find_ancestor(exp.Select)
    return None


def table_of(source: exp.Expr | None, schema: Schema) -> Table | None:
    """What the schema says about a source."""
    return schema.tables[source.name.lower()] if isinstance(source, exp.Table) else None


def declared(node: exp.Expr | None, schema: Schema) -> Column | None:
    """What the schema says about a column."""
    if not isinstance(node, exp.Column):
        return None
    table = table_of(source_of(node, schema), schema)
    return table.columns.get(node.name.lower()) if table else None


def used(node: exp.Expr, schema: Schema) -> set[int]:
    """Which sources the columns in a node belong to."""
    return {id(source_of(column, schema)) for column in node.find_all(exp.Column)}


def conjuncts(node: exp.Expr | None) -> list[exp.Expr]:
    """The conditions that AND joins in a WHERE, ON or HAVING."""
    if node is None:
        return []
    if isinstance(node, exp.Where | exp.Having | exp.Paren):
        return conjuncts(node.this) if isinstance(node.this, exp.And | exp.Paren) else [node.this]
    return conjuncts(node.left) + conjuncts(node.right) if isinstance(node, exp.And) else [node]


def filters(tree: exp.Expr) -> Iterator[exp.Expr]:
    """Conditions of WHERE joined by AND, in all its SELECTs: where NULL and false are the same."""
    for where in list(tree.find_all(exp.Where)):
        yield from conjuncts(where)


def set_where(select: exp.Select, conditions: list[exp.Expr]) -> None:
    """Put these in place of the conditions of a WHERE."""
    joined = exp.and_(*(condition.copy() for condition in conditions)) if conditions else None
    select.set("where", exp.Where(this=joined) if joined else None)


def plain(select: exp.Expr, *allowed: str) -> bool:
    """Whether a SELECT has no more than a list, tables and WHERE, and `allowed`."""
    absent = {"limit", "offset", "order", "distinct", "group", "having", "with_"} - set(allowed)
    return isinstance(select, exp.Select) and not any(select.args.get(part) for part in absent)


def aggregates(node: exp.Expr) -> list[exp.Expr]:
    """The aggregates of a SELECT itself, not those of subqueries."""
    select = node if isinstance(node, exp.Select) else node.find_ancestor(exp.Select)
    return [each for each in node.find_all(exp.AggFunc) if each.find_ancestor(exp.Select) is select]


def only_aggregates(select: exp.Select) -> bool:
    """Whether a SELECT returns one row: aggregates of all it reads, and no column beside them."""
    return not select.args.get("group") and all(
        aggregates(item) and all(column.find_ancestor(exp.AggFunc) for column in item.find_all(exp.Column))
        for item in select.expressions
    )


def inner(select: exp.Select) -> bool:
    """Whether no join of a SELECT keeps rows without a match."""
    return not any(join.side for join in select.args.get("joins") or [])


def one_row(select: exp.Select) -> bool:
    """Whether LIMIT 1 leaves no order to keep."""
    limit = select.args.get("limit")
    return bool(limit) and limit.expression.sql() == "1" and not select.args.get("offset")


def wrappable(select: exp.Select) -> bool:
    """Whether a SELECT may become a derived table: it has no order that must be kept."""
    return not select.args.get("order") or one_row(select)


def reads(select: exp.Select) -> list[exp.Column]:
    """The columns of a SELECT and of its subqueries."""
    return list(select.find_all(exp.Column))


def qualified(tree: exp.Select, schema: Schema, prefix: str) -> exp.Select | None:
    """Give all tables aliases of their own and all columns their table; `None` where a column is not a table's."""
    owners = [(column, source_of(column, schema)) for column in reads(tree)]
    if any(source is None for _, source in owners):
        return None
    names = {}
    for select in list(tree.find_all(exp.Select)):
        for source in sources(select):
            names[id(source)] = f"{prefix}{len(names) + 1}"
    for column, source in owners:
        column.set("table", exp.to_identifier(names[id(source)]))
    for select in tree.find_all(exp.Select):
        for source in sources(select):
            source.set("alias", exp.TableAlias(this=exp.to_identifier(names[id(source)])))
    return tree


# Spelling


@kind
def spelling(tree: exp.Select, schema: Schema) -> str:
    for name in tree.find_all(exp.Identifier):
        if not name.args.get("quoted"):
            name.set("this", name.name.upper())
    return f"-- the same\n{tree.sql('sqlite', pretty=True, normalize_functions='lower')}\n;"


@kind
def names_qualified(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    if any(source.alias for select in tree.find_all(exp.Select) for source in sources(select)):
        return None
    for column in reads(tree):
        source, select = source_of(column, schema), column.find_ancestor(exp.Select)
        if source is None or not any(source is each for each in sources(select)):
            return None
        column.set("table", exp.to_identifier(source.name))
    return tree


@kind
def aliases_added(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    return None if any(source.alias for source in sources(tree)) else qualified(tree, schema, "r")


@kind
def aliases_renamed(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    return qualified(tree, schema, "other_") if any(source.alias for source in sources(tree)) else None


@kind
def outputs_named(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    if tree.is_star or any(isinstance(item, exp.Alias) for item in tree.expressions):
        return None
    tree.set("expressions", [exp.alias_(item, f"out_{n}") for n, item in enumerate(tree.expressions)])
    return tree


# Conditions


def _swap(node: exp.Expr, made: type[exp.Expr]) -> None:
    node.replace(made(this=node.expression.copy(), expression=node.this.copy()))


def _comparisons(tree: exp.Expr) -> list[exp.Expr]:
    found = [node for node in tree.find_all(*FLIPS) if not node.find(exp.All, exp.Any)]
    return found[::-1]  # the inner ones first: replacing an outer one would leave them behind


@kind
def comparisons_flipped(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    found = _comparisons(tree)
    for node in found:
        _swap(node, FLIPS[type(node)])
    return tree if found else None


@kind
def comparisons_negated(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    found = _comparisons(tree)
    for node in found:
        opposite = NEGATIONS[type(node)](this=node.this.copy(), expression=node.expression.copy())
        node.replace(exp.Paren(this=exp.Not(this=exp.Paren(this=opposite))))
    return tree if found else None


@kind
def conditions_swapped(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    found = list(tree.find_all(exp.And, exp.Or))[::-1]
    for node in found:
        _swap(node, type(node))
    return tree if found else None


def _change_where(tree: exp.Select, change: Callable[[exp.Expr], exp.Expr]) -> exp.Expr | None:
    where = tree.args.get("where")
    if where is None:
        return None
    where.set("this", change(where.this.copy()))
    return tree


@kind
def doubly_negated(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    return _change_where(tree, lambda found: exp.not_(exp.paren(exp.not_(exp.paren(found)))))


@kind
def condition_repeated(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    return _change_where(tree, lambda found: exp.and_(found, exp.paren(exp.or_(found.copy(), "1 = 0"))))


@kind
def always_true_added(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    return tree.where("1 = 1", copy=False) if tree.args.get("from_") else None


@kind
def condition_as_case(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    return _change_where(tree, lambda found: exp.EQ(this=exp.case().when(found, "1").else_("0"), expression=number(1)))


@kind
def between_or_bounds(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    found = list(tree.find_all(exp.Between))
    for node in found:
        low, high = (
            bound(this=node.this.copy(), expression=node.args[name].copy())
            for bound, name in ((exp.GTE, "low"), (exp.LTE, "high"))
        )
        node.replace(exp.paren(exp.and_(low, high)))
    if found:
        return tree
    conditions = conjuncts(tree.args.get("where"))
    lows = {node.this.sql(): node for node in conditions if isinstance(node, exp.GTE)}
    for high in conditions:
        low = lows.get(high.this.sql()) if isinstance(high, exp.LTE) else None
        if low:
            between = exp.Between(this=low.this.copy(), low=low.expression.copy(), high=high.expression.copy())
            set_where(tree, [between, *(each for each in conditions if each is not low and each is not high)])
            return tree
    return None


@kind
def equals_or_in(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    found = list(tree.find_all(exp.EQ, exp.In))
    changed = False
    for node in found:
        if isinstance(node, exp.EQ) and isinstance(node.expression, exp.Literal):
            node.replace(exp.In(this=node.this.copy(), expressions=[node.expression.copy()]))
        elif isinstance(node, exp.In) and node.expressions:
            equal = [exp.EQ(this=node.this.copy(), expression=each.copy()) for each in node.expressions]
            node.replace(exp.paren(exp.or_(*equal)))
        else:
            continue
        changed = True
    return tree if changed else None


@kind
def equals_as_is(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    found = [node for node in filters(tree) if isinstance(node, exp.EQ) and isinstance(node.expression, exp.Literal)]
    for node in found:
        node.replace(exp.Is(this=node.this.copy(), expression=node.expression.copy()))
    return tree if found else None


def number(value: int) -> exp.Expr:
    """A number as it is written in SQL."""
    return exp.Literal.number(value)


def compared_literals(tree: exp.Select, schema: Schema) -> Iterator[tuple[exp.Literal, Column]]:
    """Literals that stand beside a table's column in a comparison."""
    for node in _comparisons(tree):
        for literal, other in ((node.this, node.expression), (node.expression, node.this)):
            column = declared(other, schema)
            if isinstance(literal, exp.Literal) and column:
                yield literal, column


@kind
def literals_computed(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    found = list(compared_literals(tree, schema))
    for literal, _ in found:
        nothing, operator = (exp.Literal.string(""), exp.DPipe) if literal.is_string else (number(0), exp.Add)
        literal.replace(exp.paren(operator(this=literal.copy(), expression=nothing)))
    return tree if found else None


@kind
def literals_selected(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    found = list(compared_literals(tree, schema))
    for literal, _ in found:
        literal.replace(exp.select(literal.copy()).subquery())
    return tree if found else None


def _integers(tree: exp.Select, schema: Schema) -> list[exp.Literal]:
    """Whole numbers beside columns that turn text into numbers; small enough for floats to hold them."""
    found = compared_literals(tree, schema)
    return [
        literal
        for literal, column in found
        if literal.is_int and len(literal.name) < 16 and column.affinity in ("INTEGER", "REAL", "NUMERIC")
    ]


@kind
def integers_as_floats(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    found = _integers(tree, schema)
    for literal in found:
        literal.replace(exp.Literal.number(f"{literal.name}.0"))
    return tree if found else None


@kind
def integers_as_text(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    found = _integers(tree, schema)
    for literal in found:
        literal.replace(exp.Literal.string(literal.name))
    return tree if found else None


# Joins and subqueries. Another plan may cut elsewhere at a tie: these leave LIMIT alone.


def _two_joined(select: exp.Select, schema: Schema) -> tuple[exp.Join, exp.Expr, exp.Expr] | None:
    """The one inner join of a SELECT of two tables, with both."""
    joins, both = select.args.get("joins") or [], sources(select)
    fits = len(joins) == 1 and inner(select) and not select.is_star and not select.args.get("limit")
    return (joins[0], both[0], both[1]) if fits and all(table_of(each, schema) for each in both) else None


def _matched(node: exp.Expr, one: exp.Expr, other: exp.Expr, schema: Schema) -> tuple[exp.Column, exp.Column] | None:
    """The columns that a condition equates, that of the first source first."""
    if not (isinstance(node, exp.EQ) and isinstance(node.left, exp.Column) and isinstance(node.right, exp.Column)):
        return None
    for left, right in ((node.left, node.right), (node.right, node.left)):
        if source_of(left, schema) is one and source_of(right, schema) is other:
            return left, right
    return None


@kind
def join_to_comma(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    joins = tree.args.get("joins") or []
    if not any(join.args.get("on") for join in joins) or not inner(tree) or tree.args.get("limit"):
        return None
    conditions = [each for join in joins for each in conjuncts(join.args.get("on"))]
    set_where(tree, conditions + conjuncts(tree.args.get("where")))
    for join in joins:
        join.set("on", None)
        join.set("kind", None)
    return tree


@kind
def comma_to_join(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    joins = tree.args.get("joins") or []
    if not inner(tree) or any(join.args.get("on") for join in joins) or tree.args.get("limit"):
        return None
    rest = conjuncts(tree.args.get("where"))
    before, changed = {id(sources(tree)[0])} if joins else set(), False
    for join in joins:
        before.add(id(join.this))
        on = [
            each
            for each in rest
            if isinstance(each, exp.EQ)
            and not each.find(exp.Select)
            and id(join.this) in used(each, schema) <= before
            and len(used(each, schema)) == 2
        ]
        if on:
            rest = [each for each in rest if each not in on]
            join.set("on", exp.and_(*(each.copy() for each in on)))
            join.set("kind", "INNER")
            changed = True
    set_where(tree, rest)
    return tree if changed else None


@kind
def join_sides_swapped(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    found = _two_joined(tree, schema)
    if not found:
        return None
    join, left, right = found
    first, second = left.copy(), right.copy()
    left.replace(second)
    right.replace(first)
    return tree


@kind
def join_to_in(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    found = _two_joined(tree, schema)
    if not found or not plain(tree, "group", "having", "distinct"):
        return None
    join, *both = found
    conditions = conjuncts(join.args.get("on")) + conjuncts(tree.args.get("where"))
    for kept, dropped in (both, both[::-1]):
        matches = [(each, pair) for each in conditions if (pair := _matched(each, kept, dropped, schema))]
        if len(matches) != 1:
            continue
        (match, (outer_column, inner_column)) = matches[0]
        inside = [each for each in conditions if used(each, schema) == {id(dropped)} and not each.find(exp.Select)]
        outside = [each for each in conditions if each is not match and each not in inside]
        rest = [*tree.expressions, *outside, *(tree.args[part] for part in ("group", "having") if tree.args.get(part))]
        alone = not any(id(dropped) in used(each, schema) for each in rest)
        if alone and inner_column.name.lower() == table_of(dropped, schema).unique:
            query = exp.select(inner_column.copy()).from_(dropped.copy())
            set_where(query, inside)
            set_where(tree, [exp.In(this=outer_column.copy(), query=query.subquery()), *outside])
            tree.args["from_"].set("this", kept.copy())
            tree.set("joins", None)
            return tree
    return None


def _in_subquery(node: exp.Expr) -> exp.Select | None:
    """The SELECT of one column after IN."""
    query = node.args.get("query") if isinstance(node, exp.In) else None
    select = query.this if isinstance(query, exp.Subquery) else None
    return select if isinstance(select, exp.Select) and len(select.expressions) == 1 and not select.is_star else None


@kind
def in_to_join(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    if tree.is_star or len(sources(tree)) != 1 or tree.args.get("limit") or not qualified(tree, schema, "j"):
        return None
    conditions = conjuncts(tree.args.get("where"))
    for node in conditions:
        query = _in_subquery(node)
        if not query or not isinstance(node.this, exp.Column) or not isinstance(query.expressions[0], exp.Column):
            continue
        if id(sources(tree)[0]) in used(query, schema) or query.args.get("limit"):
            continue
        source, column = sources(query)[0], query.expressions[0]
        rest = [each for each in conditions if each is not node]
        table = table_of(source, schema)
        if plain(query) and len(sources(query)) == 1 and table and column.name.lower() == table.unique:
            set_where(tree, rest + conjuncts(query.args.get("where")))
            joined, key = source.copy(), column.copy()
        else:
            query = query.copy()
            query.set("expressions", [exp.alias_(column.copy(), "v")])
            set_where(tree, rest)
            joined, key = query.distinct(copy=False).subquery("d"), exp.column("v", table="d")
        return tree.join(joined, on=exp.EQ(this=node.this.copy(), expression=key), join_type="INNER", copy=False)
    return None


def _positive(node: exp.Expr) -> tuple[exp.Expr, bool]:
    """A condition without the NOT before it, and whether there was one."""
    node = node.unnest()
    return (node.this.unnest(), True) if isinstance(node, exp.Not) else (node, False)


@kind
def in_to_exists(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    if not qualified(tree, schema, "e"):
        return None
    changed = False
    for condition in list(filters(tree)):
        node, negated = _positive(condition)
        query = _in_subquery(node)
        if not query or not plain(query, "distinct") or aggregates(query) or not isinstance(node.this, exp.Column):
            continue
        wanted, given = node.this.copy(), query.expressions[0].unalias()
        match: exp.Expr = exp.EQ(this=wanted, expression=given.copy())
        if negated:  # NOT IN is never true where either side is NULL, unless there is no row at all
            nulls = (exp.Is(this=each.copy(), expression=exp.null()) for each in (wanted, given))
            match = exp.paren(exp.or_(match, *nulls))
        inside = exp.select("1").from_(query.args["from_"].this.copy())
        inside.set("joins", [join.copy() for join in query.args.get("joins") or []])
        set_where(inside, [*conjuncts(query.args.get("where")), match])
        exists = exp.Exists(this=inside)
        condition.replace(exp.not_(exists) if negated else exists)
        changed = True
    return tree if changed else None


def _exists(
    condition: exp.Expr, schema: Schema
) -> tuple[exp.Column, exp.Column, exp.Expr, list[exp.Expr], bool] | None:
    """The outer and inner column that EXISTS matches, its table, its other conditions, and whether it is negated."""
    node, negated = _positive(condition)
    query = node.this if isinstance(node, exp.Exists) else None
    if not query or not plain(query) or len(sources(query)) != 1 or aggregates(query):
        return None
    source = sources(query)[0]
    conditions = conjuncts(query.args.get("where"))
    inside = [each for each in conditions if used(each, schema) == {id(source)} and not each.find(exp.Select)]
    rest = [each for each in conditions if each not in inside]
    if len(rest) != 1 or not isinstance(rest[0], exp.EQ):
        return None
    for outer, own in ((rest[0].left, rest[0].right), (rest[0].right, rest[0].left)):
        if isinstance(outer, exp.Column) and isinstance(own, exp.Column) and source_of(own, schema) is source:
            return (outer, own, source, inside, negated) if source_of(outer, schema) is not source else None
    return None


@kind
def exists_to_in(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    changed = False
    for condition in list(filters(tree)):
        if found := _exists(condition, schema):
            outer, own, source, inside, negated = found
            query = exp.select(own.copy()).from_(source.copy())
            set_where(query, inside)
            node: exp.Expr = exp.In(this=outer.copy(), query=query.subquery())
            if negated:  # where IN is NULL, there is no match
                node = exp.EQ(this=exp.func("COALESCE", node, number(0)), expression=number(0))
            condition.replace(node)
            changed = True
    return tree if changed else None


@kind
def exists_or_join(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    joins, conditions = tree.args.get("joins") or [], conjuncts(tree.args.get("where"))
    if tree.is_star or tree.args.get("limit"):
        return None
    if len(joins) == 1 and joins[0].side == "LEFT":
        return _left_join_to_exists(tree, joins[0], conditions, schema)
    if joins or not qualified(tree, schema, "a"):
        return None
    for condition in conjuncts(tree.args.get("where")):
        outer, own, source, inside, negated = _exists(condition, schema) or (None,) * 5
        table = table_of(source, schema)
        if not table or not (table.key if negated else own.name.lower() == table.unique):
            continue
        on = exp.and_(exp.EQ(this=outer.copy(), expression=own.copy()), *(each.copy() for each in inside))
        rest = [each for each in conjuncts(tree.args.get("where")) if each is not condition]
        if negated:
            rest.append(exp.Is(this=exp.column(table.key, table=source.alias), expression=exp.null()))
        set_where(tree, rest)
        return tree.join(source.copy(), on=on, join_type="LEFT" if negated else "INNER", copy=False)
    return None


def _left_join_to_exists(
    tree: exp.Select, join: exp.Join, conditions: list[exp.Expr], schema: Schema
) -> exp.Expr | None:
    """LEFT JOIN ... WHERE key IS NULL, where nothing else is asked of the table without a match."""
    table = table_of(join.this, schema)
    missing = [each for each in conditions if id(join.this) in used(each, schema)]
    elsewhere = any(id(join.this) in used(each, schema) for each in tree.expressions)
    if not table or not table.key or len(missing) != 1 or elsewhere or not plain(tree):
        return None
    if missing[0].sql() != f"{join.this.alias_or_name}.{table.key} IS NULL":
        return None
    inside = exp.select("1").from_(join.this.copy()).where(join.args["on"].copy())
    set_where(tree, [exp.not_(exp.Exists(this=inside)), *(each for each in conditions if each is not missing[0])])
    tree.set("joins", None)
    return tree


@kind
def filtered_by_key(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    table = table_of(sources(tree)[0], schema) if len(sources(tree)) == 1 else None
    if not table or not table.key or not tree.args.get("where") or tree.args.get("limit"):
        return None
    if not qualified(tree, schema, "k"):
        return None
    column = exp.column(table.key, table=sources(tree)[0].alias)
    query = exp.select(column.copy()).from_(sources(tree)[0].copy()).where(tree.args["where"].this.copy())
    set_where(tree, [exp.In(this=column, query=query.subquery())])
    return tree


# Aggregates


@kind
def count_star_or_key(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    changed = False
    for count in list(tree.find_all(exp.Count)):
        select = count.find_ancestor(exp.Select)
        if not inner(select):
            continue
        keyed = [(source, table.key) for source in sources(select) if (table := table_of(source, schema)) and table.key]
        if isinstance(count.this, exp.Column):
            source = source_of(count.this, schema)
            if any(source is each and count.this.name.lower() == key for each, key in keyed):
                count.set("this", exp.Star())
                changed = True
        elif isinstance(count.this, exp.Star | exp.Literal) and keyed:
            source, key = keyed[0]
            count.set("this", exp.column(key, table=source.alias_or_name))
            changed = True
    return tree if changed else None


@kind
def count_as_sum(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    counts = [count for count in tree.find_all(exp.Count) if not isinstance(count.this, exp.Distinct)]
    for count in counts:
        whole = isinstance(count.this, exp.Star | exp.Literal)
        summed = number(1) if whole else exp.not_(exp.Is(this=count.this.copy(), expression=exp.null()))
        count.replace(exp.func("COALESCE", exp.Sum(this=summed), number(0)))
    return tree if counts else None


def _aggregated_where(tree: exp.Select) -> bool:
    return plain(tree) and only_aggregates(tree) and bool(tree.args.get("where"))


@kind
def condition_in_aggregate(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    if not _aggregated_where(tree) or any(isinstance(each.this, exp.Distinct) for each in aggregates(tree)):
        return None
    condition = tree.args["where"].this
    for each in aggregates(tree):
        value = number(1) if isinstance(each.this, exp.Star) else each.this.copy()
        each.set("this", exp.case().when(condition.copy(), value))
    tree.set("where", None)
    return tree


@kind
def aggregate_of_derived(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    found = aggregates(tree)
    if not plain(tree) or not only_aggregates(tree) or len(found) != 1 or isinstance(found[0].this, exp.Distinct):
        return None
    (item,) = tree.expressions if len(tree.expressions) == 1 else (None,)
    if item is None or item is not found[0]:
        return None
    value = number(1) if isinstance(item.this, exp.Star) else item.this.copy()
    outer = item.copy()
    outer.set("this", exp.column("v"))
    tree.set("expressions", [exp.alias_(value, "v")])
    return exp.select(outer).from_(tree.subquery("d"))


@kind
def average_as_sum(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    found = [each for each in tree.find_all(exp.Avg) if not isinstance(each.this, exp.Distinct)]
    for each in found:
        total = exp.Sum(this=exp.Mul(this=each.this.copy(), expression=exp.Literal.number("1.0")))
        each.replace(exp.paren(exp.Div(this=total, expression=exp.Count(this=each.this.copy()))))
    return tree if found else None


@kind
def extreme_by_limit(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    changed = False
    for extreme in list(tree.find_all(exp.Max, exp.Min)):
        select = extreme.parent
        if not (isinstance(select, exp.Select) and plain(select) and isinstance(extreme.this, exp.Column)):
            continue
        if len(select.expressions) != 1 or declared(extreme.this, schema) is None:
            continue
        value, descending = extreme.this.copy(), isinstance(extreme, exp.Max)
        first = select.copy()
        first.set("expressions", [value])
        first.where(exp.not_(exp.Is(this=value.copy(), expression=exp.null())), copy=False)
        first.order_by(exp.Ordered(this=value.copy(), desc=descending, nulls_first=not descending), copy=False)
        first.limit(1, copy=False)
        beside = select.parent.parent if isinstance(select.parent, exp.Subquery) else None
        if select is tree:  # of no row there is an extreme, NULL, but no first
            return exp.select(first.subquery())
        if isinstance(beside, exp.EQ) and _same_affinity(beside, select.parent, extreme.this, schema):
            select.replace(first)
            changed = True
    return tree if changed else None


def _same_affinity(equal: exp.EQ, query: exp.Expr, column: exp.Expr, schema: Schema) -> bool:
    """Whether a column like that of the subquery stands beside it: a column has an affinity, MAX has none."""
    other = declared(equal.left if equal.right is query else equal.right, schema)
    return other is not None and other.affinity == declared(column, schema).affinity


# Groups


@kind
def distinct_or_group(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    if tree.args.get("limit") or aggregates(tree) or not all(isinstance(e, exp.Column) for e in tree.expressions):
        return None
    group = tree.args.get("group")
    if tree.args.get("distinct") and not group:
        tree.set("distinct", None)
        return tree.group_by(*(each.copy() for each in tree.expressions), copy=False)
    if group and set(map(str, group.expressions)) == set(map(str, tree.expressions)):
        tree.set("group", None)
        return tree.distinct(copy=False)
    return None


def _named_group(tree: exp.Select) -> list[exp.Expr]:
    """What a SELECT is grouped by, positions in its list replaced by what stands there."""
    group = tree.args.get("group")
    found = group.expressions if group else []
    return [tree.expressions[int(each.name) - 1] if isinstance(each, exp.Literal) else each for each in found]


@kind
def group_by_position(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    named = _named_group(tree)
    items = list(map(str, tree.expressions))
    if not named or not all(isinstance(each, exp.Column) and str(each) in items for each in named):
        return None
    numbered = any(isinstance(each, exp.Literal) for each in tree.args["group"].expressions)
    other = [each.copy() if numbered else number(items.index(str(each)) + 1) for each in named]
    tree.args["group"].set("expressions", other)
    return tree


@kind
def having_to_where(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    for select in list(tree.find_all(exp.Select)):
        having = select.args.get("having")
        if not having or not wrappable(select) or select.args.get("limit") or not _named_group(select):
            continue
        comparison = having.this
        if not isinstance(comparison, tuple(FLIPS)) or not isinstance(comparison.this, exp.Count):
            continue
        if used(comparison.expression, schema) & set(map(id, sources(select))):
            continue
        names = [f"h{place}" for place in range(len(select.expressions))]
        below = select.copy()
        below.set("having", None)
        listed = [exp.alias_(item.unalias().copy(), name) for item, name in zip(select.expressions, names, strict=True)]
        below.set("expressions", [*listed, exp.alias_(comparison.this.copy(), "n")])
        above = exp.select(*names).from_(below.subquery("g"))
        above.set("where", exp.Where(this=type(comparison)(this=exp.column("n"), expression=comparison.expression)))
        if select is tree:
            return above
        select.replace(above)
        return tree
    return None


@kind
def distinct_for_nothing(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    if tree.args.get("distinct") or tree.args.get("limit") or tree.args.get("order") or tree.is_star:
        return None
    items = {str(item) for item in tree.expressions}
    group = _named_group(tree)
    table = table_of(sources(tree)[0], schema) if len(sources(tree)) == 1 else None
    keyed = table is not None and any(
        isinstance(item, exp.Column) and item.name.lower() == table.key for item in tree.expressions
    )
    unique = {str(each) for each in group} <= items if group else keyed or only_aggregates(tree)
    return tree.distinct(copy=False) if unique else None


# The whole


@kind
def derived_table(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    return exp.select("*").from_(tree.subquery("whole")) if wrappable(tree) else None


@kind
def common_table(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    return exp.select("*").from_("whole").with_("whole", as_=tree) if wrappable(tree) else None


@kind
def scalar_subquery(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    single = plain(tree) and only_aggregates(tree) and len(tree.expressions) == 1
    return exp.select(tree.subquery()) if single else None


@kind
def union_with_nothing(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    if tree.args.get("order") or tree.args.get("limit") or tree.is_star:
        return None
    nothing = exp.select(*(exp.null() for _ in tree.expressions)).where("0")
    return exp.union(tree, nothing, distinct=False)


@kind
def limit_of_none(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    return None if tree.args.get("limit") else tree.limit(-1, copy=False)


@kind
def order_added(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    return tree.order_by("1", copy=False) if not tree.args.get("order") and not tree.args.get("limit") else None


@kind
def columns_coalesced(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    group = tree.args.get("group")
    if not any(isinstance(item, exp.Column) for item in tree.expressions) or (group and group.find(exp.Literal)):
        return None
    if tree.is_star or tree.args.get("order"):
        return None
    items = [exp.func("COALESCE", e, exp.null()) if isinstance(e, exp.Column) else e for e in tree.expressions]
    tree.set("expressions", items)
    return tree


@kind
def columns_permuted(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    if len(tree.expressions) < 2 or tree.is_star or tree.args.get("order"):
        return None
    if group := tree.args.get("group"):
        group.set("expressions", [each.copy() for each in _named_group(tree)])
    tree.set("expressions", tree.expressions[::-1])
    return tree


@kind
def column_added(tree: exp.Select, schema: Schema) -> exp.Expr | None:
    if tree.is_star:
        return None
    tree.set("expressions", [*tree.expressions, tree.expressions[0].copy()])
    return tree

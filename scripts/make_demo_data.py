"""Make the demo databases and questions: `python scripts/make_demo_data.py`, from the root of the repository.

Writes three small SQLite databases and two JSON files of questions with gold SQL into `t2s_pref/demo_data`. Everything
is invented here and drawn from seeded generators, so a second run writes the same bytes (the header of a SQLite file
names the SQLite version, hence only with the same SQLite).

Each question has two to four equivalent gold SQL forms, of which one is drawn as the gold: a right answer is often not
the gold text, which is what makes rejecting by text alone go wrong. All forms are executed and have to agree.

`scripts/train_demo_model.py` draws its own questions with `Generator.examples`.
"""

import argparse
import json
import random
import sqlite3
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

DEMO_DATA = Path(__file__).resolve().parent.parent / "t2s_pref" / "demo_data"
INSTRUCTION = "Answer the question with one SQLite query. Reply with the SQL only."
TRAIN_ROWS = 300
HELDOUT_ROWS = 150

Row = dict[str, str]
Rows = list[tuple]
Question = tuple[str, list[str]]  # the words, and the equivalent SQL forms


@dataclass(frozen=True)
class Table:
    """How people talk about a table: `label` is the column that names a row; the values are the words for a column."""

    name: str
    plural: str
    key: str
    label: str
    labels: str
    groups: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, str] = field(default_factory=dict)
    dates: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Link:
    """A foreign key: `forward` leads from child to parent ("books by authors"), `backward` names the children."""

    child: str
    column: str
    parent: str
    forward: str
    backward: str
    nullable: bool = False


@dataclass(frozen=True)
class Schema:
    """One demo database: its DDL (which is the prompt, too), its words and its rows."""

    db_id: str
    ddl: tuple[str, ...]
    tables: dict[str, Table]
    links: tuple[Link, ...]
    make_rows: Callable[[random.Random], dict[str, Rows]]


# --- the rows -------------------------------------------------------------------------------------------------------


def day(rng: random.Random, first_year: int, last_year: int) -> str:
    """A date as SQLite's text; no month has a 29th here, so that every one is valid."""
    return f"{rng.randint(first_year, last_year)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def sometimes(rng: random.Random, share: float, value: object) -> object:
    """NULL in `share` of the cases."""
    return None if rng.random() < share else value


FIRST = "Ada Ben Chloé Dmitri Elif Farid Greta Hugo Ines Jonas Kemi Lars Mona Nils Olga Pablo Rosa Sven Tara".split()
LAST = "Abebe Berg Costa Duarte Eriksen Fischer O'Hara Ivanov Jansen Keller Lind Moreau Novák Okoye Weiß".split()


def people(rng: random.Random, count: int, distinct: int) -> list[str]:
    """`count` names of which `distinct` differ: real tables have namesakes."""
    names = rng.sample([f"{first} {last}" for first in FIRST for last in LAST], distinct)
    return names + [rng.choice(names) for _ in range(count - distinct)]


def library_rows(rng: random.Random) -> dict[str, Rows]:
    """Authors, their books and the loans; a few books are anonymous, some loans are still open."""
    countries = ["France", "Norway", "Brazil", "Kenya", "Japan", "Côte d'Ivoire"]
    genres = ["mystery", "poetry", "history", "science", "children's"]
    authors = [
        (i, name, rng.choice(countries), sometimes(rng, 0.15, rng.randint(1930, 1995)))
        for i, name in enumerate(people(rng, 26, 24), 1)
    ]
    owners = "The Silent,The Last,The Hidden,The Paper,The Distant,A Widow's,A Sailor's,Tomorrow's".split(",")
    things = "River Garden Letter Bridge Orchard Lighthouse Map Clock".split()
    titles = [f"{owner} {thing}" for owner in owners for thing in things]
    books = []
    for i in range(1, 91):
        # The last authors stay without a book.
        author = sometimes(rng, 0.05, min(rng.randint(1, 21), rng.randint(1, 21)))
        pages = sometimes(rng, 0.06, 10 * rng.randint(6, 70))
        genre = sometimes(rng, 0.05, rng.choice(genres))
        books.append((i, rng.choice(titles), author, genre, rng.randint(1960, 2023), pages))
    members = people(rng, 18, 18)
    loans = []
    for i in range(1, 141):
        lent = day(rng, 2021, 2023)
        back = sometimes(rng, 0.15, day(rng, 2024, 2024))
        loans.append((i, min(rng.randint(1, 90), rng.randint(1, 90)), rng.choice(members), lent, back))
    return {"author": authors, "book": books, "loan": loans}


def shop_rows(rng: random.Random) -> dict[str, Rows]:
    """Customers, products and orders; some customers never ordered, some products have no category."""
    cities = ["Malmö", "Porto", "Leeds", "Gdańsk", "Saint-Denis", "Coeur d'Alene"]
    categories = ["kitchen", "garden", "toys", "office", "men's wear"]
    customers = [
        (i, name, rng.choice(cities), sometimes(rng, 0.12, rng.randint(18, 80)))
        for i, name in enumerate(people(rng, 48, 45), 1)
    ]
    things = "lamp kettle chair basket mug clock shelf towel brush tray".split()
    colours = "red blue green white black".split()
    products = []
    for i, name in enumerate(rng.sample([f"{c} {t}" for c in colours for t in things], 44), 1):
        category = sometimes(rng, 0.08, rng.choice(categories))
        products.append((i, name, category, rng.randint(6, 160) / 2, sometimes(rng, 0.08, 5 * rng.randint(0, 30))))
    orders = [
        (
            i,
            min(rng.randint(1, 42), rng.randint(1, 42)),
            min(rng.randint(1, 40), rng.randint(1, 40)),
            rng.randint(1, 12),
            day(rng, 2022, 2024),
        )
        for i in range(1, 151)
    ]
    return {"customer": customers, "product": products, "orders": orders}


def flights_rows(rng: random.Random) -> dict[str, Rows]:
    """Airports, airlines and flights; the newest airports and airlines have no flight yet."""
    countries = ["Germany", "Chile", "India", "Türkiye", "Ghana"]
    places = (
        "Altona Brisa Corvo Dunmore Eldoret Fjordby Granja Halden Izmira Jorvik Kestrel Lunden Mirador Nandor Oakham "
        "Pinares Quilla Rosario Söderby Tamale Ulmen Valdiva Westport Yarra"
    ).split()
    airports = []
    for place in places:
        altitude = sometimes(rng, 0.12, 10 * rng.randint(0, 180))
        airports.append((place[:3].upper().replace("Ö", "O"), place, rng.choice(countries), altitude))
    names = "Aero Norte,Blue Heron,Cloudline,Delta's Wing,Equator Air,Gull Express,Halcyon,Île Volante,Jetty,Kiwi Air"
    airlines = [
        (i, name, sometimes(rng, 0.1, rng.choice(countries)), rng.randint(4, 60))
        for i, name in enumerate(names.split(","), 1)
    ]
    codes = [airport[0] for airport in airports]
    flights = []
    for i in range(1, 131):
        origin, destination = rng.sample(codes[:20], 2)
        airline = sometimes(rng, 0.04, min(rng.randint(1, 8), rng.randint(1, 8)))
        seats = sometimes(rng, 0.08, rng.randint(40, 320))
        flights.append((i, airline, origin, destination, 10 * rng.randint(15, 900), seats))
    return {"airport": airports, "airline": airlines, "flight": flights}


# --- the schemas and their words ------------------------------------------------------------------------------------

SCHEMAS = (
    Schema(
        "library",
        (
            "CREATE TABLE author (author_id INTEGER PRIMARY KEY, name TEXT, country TEXT, birth_year INTEGER)",
            "CREATE TABLE book (book_id INTEGER PRIMARY KEY, title TEXT, "
            "author_id INTEGER REFERENCES author(author_id), genre TEXT, year INTEGER, pages INTEGER)",
            "CREATE TABLE loan (loan_id INTEGER PRIMARY KEY, book_id INTEGER REFERENCES book(book_id), member TEXT, "
            "loan_date TEXT, return_date TEXT)",
        ),
        {
            "author": Table(
                "author", "authors", "author_id", "name", "names", {"country": "country"}, {"birth_year": "birth year"}
            ),
            "book": Table(
                "book",
                "books",
                "book_id",
                "title",
                "titles",
                {"genre": "genre"},
                {"year": "year", "pages": "page count"},
            ),
            "loan": Table(
                "loan",
                "loans",
                "loan_id",
                "loan_id",
                "ids",
                {"member": "member"},
                {},
                {"loan_date": "loan date", "return_date": "return date"},
            ),
        },
        (
            Link("book", "author_id", "author", "books by authors", "books", nullable=True),
            Link("loan", "book_id", "book", "loans of books", "loans"),
        ),
        library_rows,
    ),
    Schema(
        "shop",
        (
            "CREATE TABLE customer (customer_id INTEGER PRIMARY KEY, name TEXT, city TEXT, age INTEGER)",
            "CREATE TABLE product (product_id INTEGER PRIMARY KEY, name TEXT, category TEXT, price REAL, "
            "stock INTEGER)",
            "CREATE TABLE orders (order_id INTEGER PRIMARY KEY, customer_id INTEGER REFERENCES customer(customer_id), "
            "product_id INTEGER REFERENCES product(product_id), quantity INTEGER, order_date TEXT)",
        ),
        {
            "customer": Table(
                "customer", "customers", "customer_id", "name", "names", {"city": "city"}, {"age": "age"}
            ),
            "product": Table(
                "product",
                "products",
                "product_id",
                "name",
                "names",
                {"category": "category"},
                {"price": "price", "stock": "stock"},
            ),
            "orders": Table(
                "orders",
                "orders",
                "order_id",
                "order_id",
                "ids",
                {},
                {"quantity": "quantity"},
                {"order_date": "order date"},
            ),
        },
        (
            Link("orders", "customer_id", "customer", "orders by customers", "orders"),
            Link("orders", "product_id", "product", "orders for products", "orders"),
        ),
        shop_rows,
    ),
    Schema(
        "flights",
        (
            "CREATE TABLE airport (code TEXT PRIMARY KEY, city TEXT, country TEXT, altitude INTEGER)",
            "CREATE TABLE airline (airline_id INTEGER PRIMARY KEY, name TEXT, country TEXT, fleet INTEGER)",
            "CREATE TABLE flight (flight_id INTEGER PRIMARY KEY, airline_id INTEGER REFERENCES airline(airline_id), "
            "origin TEXT REFERENCES airport(code), destination TEXT REFERENCES airport(code), distance INTEGER, "
            "seats INTEGER)",
        ),
        {
            "airport": Table(
                "airport", "airports", "code", "city", "cities", {"country": "country"}, {"altitude": "altitude"}
            ),
            "airline": Table(
                "airline", "airlines", "airline_id", "name", "names", {"country": "country"}, {"fleet": "fleet size"}
            ),
            "flight": Table(
                "flight",
                "flights",
                "flight_id",
                "flight_id",
                "ids",
                {"origin": "origin", "destination": "destination"},
                {"distance": "distance", "seats": "seat count"},
            ),
        },
        (
            Link("flight", "airline_id", "airline", "flights of airlines", "flights", nullable=True),
            Link("flight", "origin", "airport", "flights from airports", "departing flights"),
            Link("flight", "destination", "airport", "flights to airports", "arriving flights"),
        ),
        flights_rows,
    ),
)


def build_database(schema: Schema, path: Path, seed: int) -> None:
    """Write the database of `schema` anew to `path`, byte for byte the same each time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    rows = schema.make_rows(random.Random(f"{seed} {schema.db_id}"))
    with closing(sqlite3.connect(path)) as connection:
        for statement, (table, values) in zip(schema.ddl, rows.items(), strict=True):
            connection.execute(statement)
            connection.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(values[0]))})", values)
        connection.commit()
        assert not connection.execute("PRAGMA foreign_key_check").fetchall(), schema.db_id
        connection.execute("VACUUM")


# --- the questions --------------------------------------------------------------------------------------------------


def quote(value: object) -> str:
    """`value` as a SQL literal."""
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else f"{value:g}"


def an(words: str) -> str:
    """`words` behind the indefinite article that fits."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def aliased(form: Callable[[str, str], str]) -> list[str]:
    """`form(prefix, as_alias)` without and with an alias."""
    return [form("", ""), form("T1.", " AS T1")]


class Draw:
    """Draws tables, columns and values for one question on one database."""

    def __init__(self, schema: Schema, connection: sqlite3.Connection, rng: random.Random) -> None:
        self.schema = schema
        self.connection = connection
        self.rng = rng

    def rows(self, sql: str) -> Rows:
        """What `sql` returns."""
        return self.connection.execute(sql).fetchall()

    def pick(self, *options: str) -> str:
        """One of the phrasings."""
        return self.rng.choice(options)

    def table(self, *having: str) -> Table:
        """A table that has a column of each of the kinds in `having`: `groups`, `numbers`, `dates`."""
        return self.rng.choice([t for t in self.schema.tables.values() if all(getattr(t, kind) for kind in having)])

    def column(self, columns: dict[str, str]) -> tuple[str, str]:
        """A column and the words for it."""
        return self.rng.choice(list(columns.items()))

    def link(self) -> tuple[Link, Table, Table]:
        """A foreign key with its child and its parent."""
        link = self.rng.choice(self.schema.links)
        return link, self.schema.tables[link.child], self.schema.tables[link.parent]

    def value(self, table: Table, column: str) -> object:
        """A value that stands in the column."""
        return self.rng.choice(self.rows(f"SELECT {column} FROM {table.name} WHERE {column} IS NOT NULL"))[0]

    def condition(self, table: Table) -> tuple[str, Callable[[str], str]]:
        """A condition on `table`: the words, and the SQL behind a prefix such as `T1.`."""
        # Where the key is the label, there is no name to ask for.
        names = {} if table.label == table.key or self.rng.random() < 0.6 else {table.label: table.label}
        column, words = self.column(table.groups | table.numbers | names)
        value = self.value(table, column)
        if column in table.numbers:
            sign, comparison = self.rng.choice([(">", "above"), ("<", "below")])
            return f"whose {words} is {comparison} {value:g}", lambda prefix: f"{prefix}{column} {sign} {quote(value)}"
        return f"whose {words} is {value}", lambda prefix: f"{prefix}{column} = {quote(value)}"


def equals(d: Draw) -> Question:
    """A filter on one value."""
    t = d.table("groups")
    column, words = d.column(t.groups)
    value = d.value(t, column)
    question = d.pick(
        f"List the {t.labels} of all {t.plural} whose {words} is {value}.",
        f"Which {t.plural} have the {words} {value}? Give their {t.labels}.",
        f"Show the {t.labels} of {t.plural} with {words} {value}.",
    )
    return question, [
        *aliased(lambda p, a: f"SELECT {p}{t.label} FROM {t.name}{a} WHERE {p}{column} = {quote(value)}"),
        f"SELECT {t.label} FROM {t.name} WHERE {column} IN ({quote(value)})",
    ]


def compares(d: Draw) -> Question:
    """A filter on a number."""
    t = d.table("numbers")
    column, words = d.column(t.numbers)
    value = quote(d.value(t, column))
    sign, opposite, comparison = d.rng.choice([(">", "<", "above"), ("<", ">", "below")])
    question = d.pick(
        f"List the {t.labels} of all {t.plural} whose {words} is {comparison} {value}.",
        f"Which {t.plural} have {an(words)} {comparison} {value}? Give their {t.labels}.",
        f"Show the {t.labels} of {t.plural} with {an(words)} {comparison} {value}.",
    )
    return question, [
        *aliased(lambda p, a: f"SELECT {p}{t.label} FROM {t.name}{a} WHERE {p}{column} {sign} {value}"),
        f"SELECT {t.label} FROM {t.name} WHERE {value} {opposite} {column}",
    ]


def between(d: Draw) -> Question:
    """A filter on a range."""
    t = d.table("numbers")
    column, words = d.column(t.numbers)
    low, high = (quote(value) for value in sorted([d.value(t, column), d.value(t, column)]))
    question = d.pick(
        f"List the {t.labels} of {t.plural} whose {words} is between {low} and {high}.",
        f"Which {t.plural} have {an(words)} from {low} to {high}? Give their {t.labels}.",
    )
    return question, [
        *aliased(lambda p, a: f"SELECT {p}{t.label} FROM {t.name}{a} WHERE {p}{column} BETWEEN {low} AND {high}"),
        f"SELECT {t.label} FROM {t.name} WHERE {column} >= {low} AND {column} <= {high}",
        f"SELECT {t.label} FROM {t.name} WHERE {column} <= {high} AND {column} >= {low}",
    ]


def count(d: Draw) -> Question:
    """How many rows fulfil a condition."""
    t = d.table()
    words, where = d.condition(t)
    question = d.pick(
        f"How many {t.plural} are there {words}?",
        f"Count the {t.plural} {words}.",
        f"What is the number of {t.plural} {words}?",
    )
    return question, [
        *aliased(lambda p, a: f"SELECT COUNT(*) FROM {t.name}{a} WHERE {where(p)}"),
        *aliased(lambda p, a: f"SELECT COUNT({p}{t.key}) FROM {t.name}{a} WHERE {where(p)}"),
    ]


AGGREGATES = {"AVG": "average", "MAX": "highest", "MIN": "lowest", "SUM": "total"}


def aggregate(d: Draw) -> Question | None:
    """One number over the rows that fulfil a condition."""
    t = d.table("numbers")
    column, words = d.column(t.numbers)
    function = d.rng.choice(list(AGGREGATES))
    some, where = d.condition(t)
    if column in where(""):
        return None
    question = d.pick(
        f"What is the {AGGREGATES[function]} {words} of {t.plural} {some}?",
        f"Find the {AGGREGATES[function]} {words} of all {t.plural} {some}.",
    )
    forms = aliased(lambda p, a: f"SELECT {function}({p}{column}) FROM {t.name}{a} WHERE {where(p)}")
    if function == "MAX":
        forms.append(f"SELECT {column} FROM {t.name} WHERE {where('')} ORDER BY {column} DESC LIMIT 1")
    if function == "AVG":
        forms.append(f"SELECT SUM({column}) * 1.0 / COUNT({column}) FROM {t.name} WHERE {where('')}")
    return question, forms


def top(d: Draw) -> Question | None:
    """The n rows with the highest or the lowest number, where n cuts through no tie."""
    t = d.table("numbers")
    column, words = d.column(t.numbers)
    n = d.rng.randint(2, 9)
    order, extreme = d.rng.choice([("DESC", "highest"), ("ASC", "lowest")])
    numbers = [value for (value,) in d.rows(f"SELECT {column} FROM {t.name} WHERE {column} NOTNULL ORDER BY 1 {order}")]
    if len(set(numbers[: n + 1])) <= n:
        return None
    question = d.pick(
        f"List the {t.labels} of the {n} {t.plural} with the {extreme} {words}.",
        f"Which {n} {t.plural} have the {extreme} {words}? Give their {t.labels}.",
        f"Show the {n} {t.plural} of {extreme} {words} by their {t.labels}.",
    )
    # SQLite sorts NULL first, so the lowest need a filter.
    known = f" WHERE {column} IS NOT NULL" if order == "ASC" else ""
    aliased_known = f" WHERE T1.{column} IS NOT NULL" if order == "ASC" else ""
    return question, [
        f"SELECT {t.label} FROM {t.name}{known} ORDER BY {column} {order} LIMIT {n}",
        f"SELECT {t.label} FROM {t.name}{known} ORDER BY {column} {order}, {t.key} LIMIT {n}",
        f"SELECT T1.{t.label} FROM {t.name} AS T1{aliased_known} ORDER BY T1.{column} {order} LIMIT {n}",
    ]


def group_count(d: Draw) -> Question | None:
    """The number of rows of each group."""
    t = d.table("groups")
    column, words = d.column(t.groups)
    some, where = d.condition(t) if t.numbers and d.rng.random() < 0.7 else ("", None)
    if where and column in where(""):
        return None
    filtered = (lambda p: f" WHERE {where(p)}") if where else (lambda p: "")
    some = f" {some}" if some else ""
    question = d.pick(
        f"How many {t.plural}{some} are there for each {words}?",
        f"For each {words}, count the {t.plural}{some}.",
        f"Give every {words} with its number of {t.plural}{some}.",
    )
    return question, [
        *aliased(lambda p, a: f"SELECT {p}{column}, COUNT(*) FROM {t.name}{a}{filtered(p)} GROUP BY {p}{column}"),
        f"SELECT {column}, COUNT({t.key}) FROM {t.name}{filtered('')} GROUP BY {column}",
        f"SELECT {column}, COUNT(*) FROM {t.name}{filtered('')} GROUP BY 1",
    ]


def group_aggregate(d: Draw) -> Question:
    """One number for each group."""
    t = d.table("groups", "numbers")
    group, group_words = d.column(t.groups)
    column, words = d.column(t.numbers)
    function = d.rng.choice(list(AGGREGATES))
    question = d.pick(
        f"What is the {AGGREGATES[function]} {words} of {t.plural} for each {group_words}?",
        f"For each {group_words}, find the {AGGREGATES[function]} {words} of its {t.plural}.",
        f"Give every {group_words} with the {AGGREGATES[function]} {words} of its {t.plural}.",
    )
    return question, [
        *aliased(lambda p, a: f"SELECT {p}{group}, {function}({p}{column}) FROM {t.name}{a} GROUP BY {p}{group}"),
        f"SELECT {group}, {function}({column}) FROM {t.name} GROUP BY 1",
    ]


def arg_max(d: Draw) -> Question | None:
    """The one row that has the highest or the lowest number of its kind."""
    t = d.table("numbers", "groups")
    column, words = d.column(t.numbers)
    group, group_words = d.column(t.groups)
    value = d.value(t, group)
    function, order, extreme = d.rng.choice([("MAX", "DESC", "highest"), ("MIN", "ASC", "lowest")])
    where = f"{group} = {quote(value)}"
    best = f"(SELECT {function}({column}) FROM {t.name} WHERE {where})"
    if len(d.rows(f"SELECT 1 FROM {t.name} WHERE {where} AND {column} = {best}")) != 1:
        return None
    question = d.pick(
        f"Which of the {t.plural} with {group_words} {value} has the {extreme} {words}? Give its {t.label}.",
        f"What is the {t.label} of the one with the {extreme} {words} among {t.plural} whose {group_words} is {value}?",
    )
    known = f" AND {column} IS NOT NULL" if function == "MIN" else ""
    return question, [
        f"SELECT {t.label} FROM {t.name} WHERE {where} AND {column} = {best}",
        f"SELECT {t.label} FROM {t.name} WHERE {where}{known} ORDER BY {column} {order} LIMIT 1",
    ]


def two_conditions(d: Draw) -> Question:
    """A filter on a value and on a number."""
    t = d.table("groups", "numbers")
    group, group_words = d.column(t.groups)
    column, words = d.column(t.numbers)
    value, number = d.value(t, group), quote(d.value(t, column))
    sign, comparison = d.rng.choice([(">", "above"), ("<", "below")])
    question = d.pick(
        f"List the {t.labels} of {t.plural} whose {group_words} is {value} and whose {words} is {comparison} {number}.",
        f"Which {t.plural} with {group_words} {value} have {an(words)} {comparison} {number}? Give their {t.labels}.",
    )

    def form(prefix: str, alias: str, first: int) -> str:
        conditions = [f"{prefix}{group} = {quote(value)}", f"{prefix}{column} {sign} {number}"]
        return f"SELECT {prefix}{t.label} FROM {t.name}{alias} WHERE {conditions[first]} AND {conditions[1 - first]}"

    return question, [form("", "", 0), form("", "", 1), form("T1.", " AS T1", 0), form("T1.", " AS T1", 1)]


def join(d: Draw) -> Question:
    """Children by a condition on their parents."""
    link, child, parent = d.link()
    words, where = d.condition(parent)
    question = d.pick(
        f"List the {child.labels} of {link.forward} {words}.",
        f"Show the {child.labels} of all {link.forward} {words}.",
        f"Find the {link.forward} {words}. Give their {child.labels}.",
    )
    head = f"SELECT T1.{child.label} FROM {child.name} AS T1"
    on = f"T1.{link.column} = T2.{parent.key}"
    return question, [
        f"{head} JOIN {parent.name} AS T2 ON {on} WHERE {where('T2.')}",
        f"SELECT {child.label} FROM {child.name} WHERE {link.column} IN "
        f"(SELECT {parent.key} FROM {parent.name} WHERE {where('')})",
        f"{head} WHERE EXISTS (SELECT 1 FROM {parent.name} AS T2 WHERE {on} AND {where('T2.')})",
    ]


def join_count(d: Draw) -> Question:
    """How many children fulfil a condition on their parents."""
    link, child, parent = d.link()
    words, where = d.condition(parent)
    question = d.pick(
        f"How many {link.forward} {words} are there?",
        f"Count the {link.forward} {words}.",
        f"What is the number of {link.forward} {words}?",
    )
    joined = f"FROM {child.name} AS T1 JOIN {parent.name} AS T2 ON T1.{link.column} = T2.{parent.key}"
    inner = f"(SELECT {parent.key} FROM {parent.name} WHERE {where('')})"
    return question, [
        f"SELECT COUNT(*) {joined} WHERE {where('T2.')}",
        f"SELECT COUNT(T1.{child.key}) {joined} WHERE {where('T2.')}",
        f"SELECT COUNT(*) FROM {child.name} WHERE {link.column} IN {inner}",
    ]


def semi_join(d: Draw) -> Question:
    """Parents by a condition on their children, each once."""
    link, child, parent = d.link()
    words, where = d.condition(child)
    question = d.pick(
        f"List the {parent.labels} of {parent.plural} that have any {link.backward} {words}.",
        f"Which {parent.plural} have {link.backward} {words}? Give their {parent.labels}.",
    )
    on = f"T1.{parent.key} = T2.{link.column}"
    return question, [
        f"SELECT {parent.label} FROM {parent.name} WHERE {parent.key} IN "
        f"(SELECT {link.column} FROM {child.name} WHERE {where('')})",
        f"SELECT T1.{parent.label} FROM {parent.name} AS T1 WHERE EXISTS "
        f"(SELECT 1 FROM {child.name} AS T2 WHERE {on} AND {where('T2.')})",
        f"SELECT T1.{parent.label} FROM {parent.name} AS T1 JOIN {child.name} AS T2 ON {on} WHERE {where('T2.')} "
        f"GROUP BY T1.{parent.key}",
    ]


def without(d: Draw) -> Question:
    """Parents without any children."""
    link, child, parent = d.link()
    words, where = d.condition(parent) if d.rng.random() < 0.5 else ("", None)
    also = (lambda prefix: f" AND {where(prefix)}") if where else (lambda prefix: "")
    subject = f"{parent.plural} {words} and that" if words else f"{parent.plural} that"
    question = d.pick(
        f"List the {parent.labels} of {subject} have no {link.backward}.",
        f"Show the {parent.labels} of all {subject} are without any {link.backward}.",
    )
    on = f"T1.{parent.key} = T2.{link.column}"
    # NOT IN is empty as soon as the list holds a NULL.
    known = f" WHERE {link.column} IS NOT NULL" if link.nullable else ""
    return question, [
        f"SELECT {parent.label} FROM {parent.name} WHERE {parent.key} NOT IN "
        f"(SELECT {link.column} FROM {child.name}{known}){also('')}",
        f"SELECT T1.{parent.label} FROM {parent.name} AS T1 WHERE NOT EXISTS "
        f"(SELECT 1 FROM {child.name} AS T2 WHERE {on}){also('T1.')}",
        f"SELECT T1.{parent.label} FROM {parent.name} AS T1 LEFT JOIN {child.name} AS T2 ON {on} "
        f"WHERE T2.{child.key} IS NULL{also('T1.')}",
    ]


def more_than(d: Draw) -> Question:
    """Parents with more than n children."""
    link, child, parent = d.link()
    n = d.rng.randint(1, 12)
    question = d.pick(
        f"List the {parent.labels} of {parent.plural} that have more than {n} {link.backward}.",
        f"Which {parent.plural} have more than {n} {link.backward}? Give their {parent.labels}.",
        f"Show the {parent.labels} of {parent.plural} with over {n} {link.backward}.",
    )
    on = f"T1.{parent.key} = T2.{link.column}"
    head = f"SELECT T1.{parent.label} FROM {parent.name} AS T1 JOIN {child.name} AS T2 ON {on}"
    return question, [
        f"{head} GROUP BY T1.{parent.key} HAVING COUNT(*) > {n}",
        f"{head} GROUP BY T1.{parent.key} HAVING COUNT(*) >= {n + 1}",
        f"SELECT {parent.label} FROM {parent.name} WHERE {parent.key} IN "
        f"(SELECT {link.column} FROM {child.name} GROUP BY {link.column} HAVING COUNT(*) > {n})",
    ]


def missing(d: Draw) -> Question:
    """Rows of which a value is not known."""
    t = d.table()
    column, words = d.column(t.groups | t.numbers | t.dates)
    if d.rng.random() < 0.5:
        question = d.pick(
            f"List the {t.labels} of {t.plural} that have no {words}.",
            f"Show the {t.labels} of all {t.plural} whose {words} is missing.",
            f"Which {t.plural} have an unknown {words}? Give their {t.labels}.",
        )
        return question, aliased(lambda p, a: f"SELECT {p}{t.label} FROM {t.name}{a} WHERE {p}{column} IS NULL")
    question = d.pick(
        f"How many {t.plural} have no {words}?",
        f"Count the {t.plural} whose {words} is missing.",
        f"What is the number of {t.plural} with an unknown {words}?",
    )
    return question, [
        *aliased(lambda p, a: f"SELECT COUNT(*) FROM {t.name}{a} WHERE {p}{column} IS NULL"),
        f"SELECT COUNT({t.key}) FROM {t.name} WHERE {column} IS NULL",
        f"SELECT COUNT(*) - COUNT({column}) FROM {t.name}",
    ]


def different(d: Draw) -> Question:
    """The distinct values of a column among the rows that fulfil a condition."""
    t = d.table("groups", "numbers")
    column, words = d.column(t.groups)
    number, number_words = d.column(t.numbers)
    value = quote(d.value(t, number))
    sign, comparison = d.rng.choice([(">", "above"), ("<", "below")])
    question = d.pick(
        f"What are the different values of {words} of {t.plural} with {an(number_words)} {comparison} {value}?",
        f"List each {words} once among {t.plural} whose {number_words} is {comparison} {value}.",
    )
    return question, [
        *aliased(lambda p, a: f"SELECT DISTINCT {p}{column} FROM {t.name}{a} WHERE {p}{number} {sign} {value}"),
        f"SELECT {column} FROM {t.name} WHERE {number} {sign} {value} GROUP BY {column}",
    ]


def beyond_average(d: Draw) -> Question:
    """Rows above or below the average."""
    t = d.table("numbers")
    column, words = d.column(t.numbers)
    sign, opposite, comparison = d.rng.choice([(">", "<", "above"), ("<", ">", "below")])
    question = d.pick(
        f"List the {t.labels} of {t.plural} whose {words} is {comparison} average.",
        f"Which {t.plural} have {an(words)} {comparison} the average? Give their {t.labels}.",
        f"Show the {t.labels} of {t.plural} with {an(words)} {comparison} the mean.",
    )
    average = f"(SELECT AVG({column}) FROM {t.name})"
    return question, [
        *aliased(lambda p, a: f"SELECT {p}{t.label} FROM {t.name}{a} WHERE {p}{column} {sign} {average}"),
        f"SELECT {t.label} FROM {t.name} WHERE {average} {opposite} {column}",
    ]


def in_period(d: Draw) -> Question | None:
    """Rows of one month or year."""
    if not any(t.dates for t in d.schema.tables.values()):
        return None
    t = d.table("dates")
    column, words = d.column(t.dates)
    length, pattern = d.rng.choice([(4, "%Y"), (7, "%Y-%m")])
    period = d.value(t, column)[:length]
    question = d.pick(
        f"List the {t.labels} of {t.plural} with {an(words)} in {period}.",
        f"Which {t.plural} have {an(words)} in {period}? Give their {t.labels}.",
        f"Show the {t.labels} of all {t.plural} whose {words} is in {period}.",
    )
    return question, [
        *aliased(lambda p, a: f"SELECT {p}{t.label} FROM {t.name}{a} WHERE {p}{column} LIKE '{period}-%'"),
        f"SELECT {t.label} FROM {t.name} WHERE STRFTIME('{pattern}', {column}) = '{period}'",
        f"SELECT {t.label} FROM {t.name} WHERE SUBSTR({column}, 1, {length}) = '{period}'",
    ]


KINDS = (
    equals,
    compares,
    between,
    count,
    aggregate,
    top,
    group_count,
    group_aggregate,
    arg_max,
    two_conditions,
    join,
    join_count,
    semi_join,
    without,
    more_than,
    missing,
    different,
    beyond_average,
    in_period,
)


class Generator:
    """Draws examples from the databases under `folder`, which [`build_database`] has written."""

    def __init__(self, folder: Path) -> None:
        self.connections = {
            schema.db_id: sqlite3.connect(folder / schema.db_id / f"{schema.db_id}.sqlite") for schema in SCHEMAS
        }

    def examples(self, seed: int, exclude: Collection[tuple[str, str]] = (), repeat: bool = True) -> Iterator[Row]:
        """Yield rows without end; none asks a `(db_id, input)` of `exclude` and, without `repeat`, none asks twice.

        The databases take turns and the kind of question is drawn evenly, so each is equally common.
        """
        rng = random.Random(seed)
        seen = set(exclude)
        while True:
            for schema in SCHEMAS:
                row = None
                while row is None or (schema.db_id, row["input"]) in seen:
                    row = self._example(schema, rng)
                if not repeat:
                    seen.add((schema.db_id, row["input"]))
                yield row

    def _example(self, schema: Schema, rng: random.Random) -> Row | None:
        draw = Draw(schema, self.connections[schema.db_id], rng)
        asked = rng.choice(KINDS)(draw)
        if asked is None:
            return None
        question, forms = asked
        answer, *others = (Counter(draw.rows(sql)) for sql in forms)
        # An answer of nothing, NULL or 0 is matched by many a wrong query.
        if not answer or set(answer) in ({(None,)}, {(0,)}):
            return None
        assert all(other == answer for other in others), f"{question}: {forms} differ"
        tables = "\n".join(f"{statement};" for statement in schema.ddl)
        return {
            "instruction": INSTRUCTION,
            "input": f"{tables}\n\nQuestion: {question}",
            "output": rng.choice(forms),
            "db_id": schema.db_id,
        }


def main() -> None:
    """Write the databases and the questions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DEMO_DATA, help="folder to write to (default: the package's)")
    parser.add_argument("--seed", type=int, default=7, help="of the rows and of the questions (default: 7)")
    arguments = parser.parse_args()

    databases = arguments.output / "databases"
    for schema in SCHEMAS:
        build_database(schema, databases / schema.db_id / f"{schema.db_id}.sqlite", arguments.seed)
    examples = Generator(databases).examples(arguments.seed, repeat=False)
    for name, rows in (("train", TRAIN_ROWS), ("heldout", HELDOUT_ROWS)):
        path = arguments.output / f"{name}.json"
        text = json.dumps([next(examples) for _ in range(rows)], indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8", newline="\n")
        print(f"{path.name}: {rows} rows")


if __name__ == "__main__":
    main()

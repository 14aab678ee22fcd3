"""Real PostgreSQL and MariaDB (or MySQL) servers: a database and a role that may only read, made and dropped.

They are looked for at their usual ports on 127.0.0.1; `T2S_PREF_TEST_POSTGRES` and `T2S_PREF_TEST_MYSQL` name others,
as SQLAlchemy URLs of an administrator.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import create_engine, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

ADMIN = {
    "postgres": os.environ.get("T2S_PREF_TEST_POSTGRES", "postgresql+psycopg://postgres@127.0.0.1:5432/postgres"),
    "mysql": os.environ.get("T2S_PREF_TEST_MYSQL", "mysql+pymysql://root@127.0.0.1:3306/"),
}
HOW = {
    "postgres": "start one: docker run -e POSTGRES_HOST_AUTH_METHOD=trust -p 5432:5432 postgres",
    "mysql": "start one: docker run -e MARIADB_ALLOW_EMPTY_ROOT_PASSWORD=1 -p 3306:3306 mariadb",
}
PASSWORD = "s3cret-Pa55"

TABLES = {
    "postgres": (
        "CREATE TABLE book (id integer PRIMARY KEY, title text, price numeric(8, 2), bought date, lent boolean, "
        "note jsonb, cover bytea)",
        "INSERT INTO book VALUES (1, '100 % ''Jazz'' :x', 9.50, '2020-01-02', true, '{\"a\": [2]}', '\\x00ff'), "
        "(2, 'Zürich', 12, NULL, false, NULL, NULL), (3, NULL, 12, '9999-12-31', NULL, NULL, NULL)",
        "CREATE SEQUENCE ticket",
    ),
    "mysql": (
        "CREATE TABLE book (id integer PRIMARY KEY, title varchar(99), price decimal(8, 2), bought date, lent boolean, "
        "note json, cover blob) CHARACTER SET utf8mb4",
        "INSERT INTO book VALUES (1, '100 % ''Jazz'' :x', 9.50, '2020-01-02', true, '{\"a\": [2]}', x'00ff'), "
        "(2, 'Zürich', 12, NULL, false, NULL, NULL), (3, NULL, 12, '9999-12-31', NULL, NULL, NULL)",
    ),
}


def administer(kind: str, statements: tuple[str, ...], database: str | None = None) -> list[tuple]:
    """Run statements as the administrator; the rows of the last, where it has any."""
    url = make_url(ADMIN[kind])
    engine = create_engine(url.set(database=database) if database else url, poolclass=NullPool)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for statement in statements:
            # an empty tuple of parameters would make % a placeholder
            result = connection.connection.cursor()
            result.execute(statement)
        return list(result.fetchall()) if result.description else []


@contextmanager
def reading_role(kind: str) -> Iterator[str]:
    """The URL, with a password, of a role that may only read a database of its own."""
    name = f"t2s_{secrets.token_hex(6)}"
    url = make_url(ADMIN[kind])
    try:
        administer(kind, (f"CREATE DATABASE {name}",))
    except SQLAlchemyError as error:
        pytest.skip(f"no {kind} at {url.host}:{url.port} ({type(error).__name__}); {HOW[kind]}")
    try:
        administer(kind, TABLES[kind], name)
        if kind == "postgres":
            administer(kind, (f"CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD}'",))
            administer(kind, (f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {name}",), name)
        else:
            who = f"'{name}'@'%'"
            administer(kind, (f"CREATE USER {who} IDENTIFIED BY '{PASSWORD}'", f"GRANT SELECT ON {name}.* TO {who}"))
        scheme = "postgresql" if kind == "postgres" else "mysql"
        yield f"{scheme}://{name}:{PASSWORD}@{url.host}:{url.port}/{name}"
    finally:
        if kind == "postgres":
            administer(kind, (f"DROP DATABASE {name} WITH (FORCE)", f"DROP ROLE IF EXISTS {name}"))
        else:
            administer(kind, (f"DROP DATABASE {name}", f"DROP USER IF EXISTS '{name}'@'%'"))

"""JSON text to records: parsed one by one, so that whatever is malformed is named with its record and line."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from t2s_pref.errors import UserError

LINES_SUFFIXES = (".jsonl", ".ndjson")
AS_A_FILE = "as a JSON array or one a line"

KINDS = {
    str: "a string",
    int: "an integer",
    float: "a float",
    bool: "a boolean",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
_NOT_UTF8 = (
    (b"\xff\xfe\x00\x00", "UTF-32 text; re-encode it as UTF-8"),
    (b"\x00\x00\xfe\xff", "UTF-32 text; re-encode it as UTF-8"),
    (b"\xff\xfe", "UTF-16 text; re-encode it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text; re-encode it as UTF-8"),
    (b"\x1f\x8b", "compressed with gzip; unpack it first"),
    (b"PK\x03\x04", "a zip archive; unpack it first"),
    (b"PAR1", "a Parquet file; pass Dataset.from_parquet(path)"),
)
_BLANK = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True)
class Origin:
    """Where records come from and what they should be, so that an error can say where to look and what for."""

    name: str
    expected: str
    text: str = ""
    offsets: list[int] = field(default_factory=list)  # of each record in `text`; none for a dataset

    def line(self, offset: int) -> int:
        """The line at an offset of the text, from 1."""
        return self.text.count("\n", 0, offset) + 1

    def at(self, record: int) -> str:
        """A record by its number, from 0, and its line where there is one."""
        return f"record {record}" + (f" (line {self.line(self.offsets[record])})" if self.offsets else "")

    def error(self, problem: str, record: int | None = None) -> UserError:
        """What is wrong, with where it is before it."""
        return UserError(f"{self.name}: {problem}" if record is None else f"{self.name}: {self.at(record)}: {problem}")


def read_records(path: Path, expected: str) -> tuple[list[dict[str, Any]], Origin]:
    """The objects in a file of one JSON array or of JSON lines, and where they come from; errors say what is expected.

    Raises:
        [`UserError`]: where the file cannot be read, is not UTF-8, is not JSON, or holds anything but objects.
    """
    text = _read_text(path)
    origin = Origin(str(path), expected, text)
    if _skip_blank(text, 0) == len(text):
        raise UserError(f"{path}: is empty; {expected}, {AS_A_FILE}.")
    lines = path.suffix.lower() in LINES_SUFFIXES or _holds_json_lines(text)
    records = _parse_lines(origin) if lines else _parse_array(origin)
    if not records:
        raise origin.error(f"holds no records; {expected}.")
    return records, origin


def write_records(file: IO[str], records: Iterable[dict[str, Any]], *, lines: bool) -> None:
    """Write one object a line, or the very text of `json.dump(list(records), file, indent=2)` without the list.

    What JSON lacks, a date from a dataset on the Hub say, is written as text.
    """
    separator = "[\n  "
    for record in records:
        if lines:
            file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
        else:
            # A line feed inside a string is written \n, so every real one is indentation.
            file.write(separator + json.dumps(record, ensure_ascii=False, indent=2, default=str).replace("\n", "\n  "))
            separator = ",\n  "
    if not lines:
        file.write("\n]\n")


def lone_surrogate(text: str) -> str | None:
    """The first half of a surrogate pair that stands alone, as JSON escapes can write it, or `None`."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return text[error.start]
    return None


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from error
    for start, kind in _NOT_UTF8:
        if data.startswith(start):
            raise UserError(f"{path}: is {kind}.")
    if b"\x00" in data[:4]:  # JSON starts with ASCII characters
        raise UserError(f"{path}: is UTF-16 or UTF-32 text, or binary; re-encode it as UTF-8.")
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}: byte {data[error.start]:#04x} at offset {error.start} (line {line}) is not UTF-8; "
            "re-encode the file as UTF-8, for instance iconv -f <its encoding> -t UTF-8."
        ) from error
    return text


def _holds_json_lines(text: str) -> bool:
    """Whether the first line is a whole object and more follows: an array or a single object never looks like that."""
    line, _, rest = text.lstrip(" \t\n\r").partition("\n")
    if not line.startswith("{") or not rest.strip():
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parse_lines(origin: Origin) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    start = 0
    for line in origin.text.split("\n"):  # splitlines() would cut inside strings, at U+2028 for one
        offset, start = start, start + len(line) + 1
        begin = _skip_blank(line, 0)
        if begin == len(line):
            continue
        if not records and line[begin] == "[":
            raise origin.error("holds a JSON array, not JSON Lines; rename it to .json.")
        record, end = _decode(line, begin, origin, offset)
        if _skip_blank(line, end) < len(line):
            raise origin.error(f"text after the object, {line[end : end + 20]!r}; one object a line.", len(records))
        records.append(record)
    return records


def _parse_array(origin: Origin) -> list[dict[str, Any]]:
    text = origin.text
    start = _skip_blank(text, 0)
    if text[start] != "[":
        raise origin.error(_not_an_array(origin, start))
    records: list[dict[str, Any]] = []
    position = _skip_blank(text, start + 1)
    while text[position : position + 1] != "]":
        record, end = _decode(text, position, origin)
        records.append(record)
        position = _skip_blank(text, end)
        mark = text[position : position + 1]
        if mark == ",":
            position = _skip_blank(text, position + 1)
            if text[position : position + 1] == "]":
                raise origin.error("trailing comma after this record, the last; remove it.", len(records) - 1)
        elif mark != "]":
            found = f"line {origin.line(position)} has {text[position : position + 20]!r}" if mark else "the file ends"
            raise origin.error(f"after this record {found}; expected , or ]", len(records) - 1)
    if _skip_blank(text, position + 1) < len(text):
        raise origin.error(f"line {origin.line(position)}: text after the ] that closes the array; remove it.")
    return records


def _not_an_array(origin: Origin, start: int) -> str:
    wanted = f"{origin.expected}, {AS_A_FILE}."
    try:
        value, _ = json.JSONDecoder().raw_decode(origin.text, start)
    except (ValueError, RecursionError):
        return f"starts with {origin.text[start : start + 20]!r}, not with an array; {wanted}"
    found = KINDS[type(value)]
    if isinstance(value, dict):
        found += f" with the keys {list(value)[:8]}"
        under = next((key for key, inner in value.items() if isinstance(inner, list)), None)
        if under is not None:
            found += f"; the records seem to be under {under!r}, so save that list alone"
    return f"is one value, {found}; {wanted}"


def _skip_blank(text: str, position: int) -> int:
    return _BLANK.match(text, position).end()  # matches always, be it nothing


class _DuplicateKeyError(ValueError):
    """A key stands twice in one object: the standard parser would drop the first value silently."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKeyError(f"key {next(n for n in names if names.count(n) > 1)!r} appears twice in one object.")
    return result


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _decode(text: str, position: int, origin: Origin, base: int = 0) -> tuple[dict[str, Any], int]:
    """Parse the record at `position` of `text`, which begins at offset `base` of the file."""
    number = len(origin.offsets)
    origin.offsets.append(base + position)
    try:
        record, end = _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise origin.error(_syntax_problem(error, origin.line(base + error.pos)), number) from error
    except RecursionError as error:
        raise origin.error("lists or objects are nested too deeply.", number) from error
    except _DuplicateKeyError as error:
        raise origin.error(str(error), number) from error
    except ValueError as error:  # Python's limit on the digits of an integer
        raise origin.error("a number has thousands of digits; write it as a string.", number) from error
    if not isinstance(record, dict):
        raise origin.error(f"is {KINDS[type(record)]}; {origin.expected}.", number)
    return record, end


def _syntax_problem(error: json.JSONDecodeError, line: int) -> str:
    before, after = error.doc[: error.pos].rstrip(), error.doc[error.pos :].lstrip()
    if not after or error.msg.startswith("Unterminated string"):
        return "ends too early: the file is cut off, or a quote or bracket is missing."
    if (before.endswith(",") and after[0] in "}]") or error.msg.startswith("Illegal trailing comma"):
        return f"trailing comma at line {line} column {error.colno}; remove it."
    return f"not JSON: {error.msg} at line {line} column {error.colno}, before {after[:20]!r}."

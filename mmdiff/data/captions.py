"""Captions of a media file: from a `.json` or `.txt` beside it, or from a row of a table."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

MAX_TEXT_BYTES = 1 << 20  # of one caption file; the metadata in a .json may be long
MAX_CHARACTERS = 20_000  # of one caption


class CaptionError(ValueError):
    """Captions that cannot be used; `kind` is a word for reports that count the reasons."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def of_files(json_text: bytes | None, plain_text: bytes | None) -> tuple[list[str], dict[str, Any]]:
    """Captions and metadata from the text beside a media file; the `.json` goes before the `.txt`.

    Raises CaptionError when a text is too large, not UTF-8 or no JSON object.
    """
    for text in (json_text, plain_text):
        if text is not None and len(text) > MAX_TEXT_BYTES:
            raise CaptionError("caption too large", f"its caption file is over {MAX_TEXT_BYTES} bytes; shorten it")
    captions: list[str] = []
    meta: dict[str, Any] = {}
    if json_text is not None:
        captions, meta = of_record(_object(_decoded(json_text, ".json")))
    if plain_text is not None and not captions:
        lines = [line.strip() for line in _decoded(plain_text, ".txt").splitlines()]
        captions = _checked([line for line in lines if line])
    return captions, meta


def of_record(record: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """`caption` first, then the others of `captions`; `text` where neither is there. The rest is metadata.

    Raises CaptionError when one is too long or was not UTF-8.
    """
    more = record.get("captions")
    given = [record.get("caption"), *(more if isinstance(more, list | tuple) else [more])]
    if not any(given):
        given = [record.get("text")]
    captions = [text.strip() for text in given if isinstance(text, str) and text.strip()]
    meta = {name: value for name, value in record.items() if name not in ("caption", "captions", "text")}
    return _checked(list(dict.fromkeys(captions))), meta


def json_rows(data: bytes) -> Iterator[tuple[int, dict[str, Any] | CaptionError]]:
    """(number of the line from 1 on, its object or why it has none) of the lines of a JSONL file."""
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            try:
                yield number, _object(_decoded(line, "line"))
            except CaptionError as error:
                yield number, error


def csv_rows(data: bytes) -> Iterator[tuple[int, dict[str, Any] | CaptionError]]:
    """(number of the line that it ends on, its columns or why it has none) of the rows of a CSV file with a header."""
    text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="surrogateescape")
    reader = csv.reader(io.StringIO(text, newline=""))
    header: list[str] | None = None
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield reader.line_num, CaptionError("row unreadable", f"cannot be read ({error}); repair or shorten it")
            continue
        if header is None:
            header = row
        elif row:
            yield reader.line_num, dict(zip(header[: len(row)], row[: len(header)], strict=True))


def _object(text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CaptionError("caption unreadable", f"its .json cannot be read ({error}); write it again") from error
    if not isinstance(record, dict):
        raise CaptionError("caption unreadable", 'its .json is not an object; write {"caption": "..."}')
    return record


def _decoded(text: bytes, name: str) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CaptionError("caption not UTF-8", f"its {name} is not UTF-8 ({error}); save it as UTF-8") from error


def _checked(captions: list[str]) -> list[str]:
    for text in captions:
        if len(text) > MAX_CHARACTERS:
            raise CaptionError(
                "caption too large", f"its caption has {len(text)} characters, over {MAX_CHARACTERS}; shorten it"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair: no text, and no tokenizer's input
            raise CaptionError("caption not UTF-8", "its caption is not UTF-8; save it as UTF-8") from error
    return captions

"""Parquet files as Hugging Face writes them: images as structs of bytes and path, class labels, numbers, text."""

import bisect
import collections
import glob
import itertools
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.data.images import check_image_options, decode_image
from experiments.data.sources import require_file, stack_records


class ParquetRecords:
    """Rows of one or several Parquet files, in any order.

    What a record holds follows from the type of each column:

    - struct with `bytes` (an image of Hugging Face `datasets`) or binary: float32 (height, width, channels) in [0, 1]
    - integers and booleans: int32 ()
    - floating point: float32 ()
    - lists of these numbers: int32 or float32 (length,)
    - text: str

    A file is read by row groups. Those read last are kept in memory, still compressed as images, up to `cache_bytes`.
    A dataset that fits is read once; a larger one in shuffled order is read again and again, so rewrite it with small
    row groups or raise the limit.

    Args:
        paths: a file, a pattern such as `"data/train-*.parquet"` whose files are sorted, or a sequence of files.
        columns: `{name in the record: name of the column}`, by default all columns under their own names. Use
            `{"image": "img", "label": "fine_label"}` to give records the names that the experiments expect.
        size: (height, width) that every image is brought to, as by `ImageFolder`; None leaves images as they are.
        channels: 3 for colour or 1 for grey images.
        cache_bytes: the most bytes of row groups to keep; one group is kept in any case.

    Attributes:
        classes: the names of the classes, where the first file's description has them for the column of `label`; empty
            where there is no such description, or one that is not of the form that `datasets` writes.
        paths: the files.

    Raises:
        FileNotFoundError: no file matches, or one is a folder.
        ValueError: a file is not Parquet or is truncated, a column is missing, has a type not listed above or another
            type than in the first file, there are no rows, or `size` or `channels` is out of range. A null, a corrupt
            image and an integer beyond int32 raise when the row is read.

    Example:
        >>> import pyarrow, pyarrow.parquet, tempfile
        >>> from experiments.data.pipeline import training_batches
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rows = pyarrow.table({"text": ["good", "bad"], "stars": [5, 1]})
        ...     pyarrow.parquet.write_table(rows, f"{folder}/train-0.parquet")
        ...     source = ParquetRecords(f"{folder}/train-*.parquet", columns={"text": "text", "label": "stars"})
        ...     batch = next(iter(training_batches(source, batch_size=2, seed=0)))
        >>> sorted(zip(batch["label"].tolist(), batch["text"].tolist()))
        [(1, 'bad'), (5, 'good')]
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        *,
        columns: Mapping[str, str] | None = None,
        size: tuple[int, int] | None = None,
        channels: int = 3,
        cache_bytes: int = 1 << 30,
    ):
        check_image_options(size, channels)
        self.paths, self.size, self.channels = _expand(paths), size, channels
        self._metadata, schemas, counts = zip(*map(_read_metadata, self.paths), strict=True)
        first = schemas[0]
        self.columns = dict(columns or {name: name for name in first.names})
        for path, schema in zip(self.paths, schemas, strict=True):
            _check_schema(path, schema, first, self.columns)
        self.classes = _class_names(first, self.columns.get("label"))
        groups = [(file, group, rows) for file, count in enumerate(counts) for group, rows in enumerate(count) if rows]
        self._groups = [(file, group) for file, group, _ in groups]
        self._starts = [0, *itertools.accumulate(rows for _, _, rows in groups)]
        if len(self) == 0:
            raise ValueError(f"{', '.join(self.paths)}: no rows, expected at least one")
        self._cache_bytes = cache_bytes
        self._cache = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index}, expected 0 to {len(self) - 1}")
        place = bisect.bisect_right(self._starts, index) - 1
        return self._record(place, index - self._starts[place])

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        # Rows of one row group after another, so that each is read once even where only one fits into the cache.
        order = np.argsort(indices, kind="stable")
        records = {int(place): self[int(indices[place])] for place in order}
        return stack_records([records[place] for place in range(len(indices))], self.paths[0])

    def _record(self, place: int, row: int) -> dict[str, np.ndarray]:
        table, file = self._read_group(place), self.paths[self._groups[place][0]]
        record = {}
        for name, column in self.columns.items():
            where = f"{file}: column '{column}', row {row} of row group {self._groups[place][1]}"
            try:
                value = table[column][row].as_py()
            except ValueError as error:
                raise ValueError(f"{where}: cannot be read, the file is corrupt ({error})") from error
            record[name] = self._convert(value, table.schema.field(column).type, where)
        return record

    def _convert(self, value, type_, where: str):
        import pyarrow as pa

        if _is_image(type_):
            content = value.get("bytes") if isinstance(value, dict) else value
            if content is None:
                raise ValueError(
                    f"{where}: no bytes, expected the image itself (files beside the Parquet file are not read)"
                )
            return decode_image(content, where, size=self.size, channels=self.channels)
        values = value if _element(type_) is not type_ else [value]
        if values is None or any(item is None for item in values):
            raise ValueError(f"{where}: null, expected a value of type {type_}")
        if pa.types.is_string(type_) or pa.types.is_large_string(type_):
            return value
        if pa.types.is_floating(_element(type_)):
            return np.asarray(value, np.float32)
        try:
            return np.asarray(value, np.int32)
        except OverflowError as error:
            raise ValueError(f"{where}: {value} does not fit into int32") from error

    def _read_group(self, place: int):
        with self._lock:
            if place in self._cache:
                self._cache.move_to_end(place)
                return self._cache[place]
        table = self._open_group(*self._groups[place], self._starts[place + 1] - self._starts[place])
        with self._lock:
            self._cache[place] = table
            while len(self._cache) > 1 and sum(kept.nbytes for kept in self._cache.values()) > self._cache_bytes:
                self._cache.popitem(last=False)
        return table

    def _open_group(self, file: int, group: int, rows: int):
        import pyarrow.parquet as pq

        path = self.paths[file]
        try:
            with pq.ParquetFile(path, metadata=self._metadata[file]) as reader:
                table = reader.read_row_group(group, columns=list(dict.fromkeys(self.columns.values())))
        except _damage() as error:
            raise ValueError(f"{path}: row group {group} cannot be read, the file is corrupt ({error})") from error
        if table.num_rows != rows:
            raise ValueError(f"{path}: row group {group} has {table.num_rows} rows, expected {rows}: it is corrupt")
        return table


def _expand(paths) -> tuple[str, ...]:
    if isinstance(paths, str | Path):
        found = tuple(sorted(glob.glob(str(paths)))) or tuple(str(paths) for _ in range(Path(paths).is_file()))
        if not found:
            raise FileNotFoundError(f"{paths}: no such file, and no file matches it as a pattern")
        return found
    if not paths:
        raise FileNotFoundError("paths is empty, expected at least one Parquet file")
    return tuple(str(path) for path in paths)


def _damage() -> tuple[type[Exception], ...]:
    """What pyarrow raises for damaged files; names that are no text come as a UnicodeDecodeError, a ValueError."""
    import pyarrow as pa

    return (pa.ArrowException, OSError, ValueError, IndexError, KeyError)


def _read_metadata(path: str):
    """Returns the metadata of a file, its Arrow schema, and the number of rows of each row group."""
    import pyarrow.parquet as pq

    require_file(Path(path))
    try:
        metadata = pq.read_metadata(path)
        schema = metadata.schema.to_arrow_schema()
        rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        if min(rows, default=0) < 0:
            raise ValueError(f"row groups of {rows} rows")
    except _damage() as error:
        raise ValueError(f"{path}: not a Parquet file, or truncated ({error})") from error
    return metadata, schema, rows


def _is_image(type_) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(type_):
        return type_.get_field_index("bytes") >= 0 and _is_image(type_.field("bytes").type)
    return pa.types.is_binary(type_) or pa.types.is_large_binary(type_)


def _element(type_):
    """The type of what a list holds; any other type itself."""
    import pyarrow as pa

    listed = pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)
    return type_.value_type if listed else type_


def _is_supported(type_) -> bool:
    import pyarrow as pa

    element = _element(type_)
    number = pa.types.is_integer(element) or pa.types.is_floating(element) or pa.types.is_boolean(element)
    return number or pa.types.is_string(type_) or pa.types.is_large_string(type_) or _is_image(type_)


def _check_schema(path: str, schema, first, columns: Mapping[str, str]) -> None:
    for column in columns.values():
        if column not in schema.names:
            raise ValueError(f"{path}: has no column '{column}', only {', '.join(schema.names)}; choose with columns=")
        if schema.names.count(column) > 1:
            raise ValueError(f"{path}: has several columns '{column}', so none can be chosen by this name")
        type_ = schema.field(column).type
        if not _is_supported(type_):
            raise ValueError(
                f"{path}: column '{column}' has type {type_}, expected an image (struct with bytes, or binary), "
                "numbers, lists of numbers or text; leave it out with columns="
            )
        if type_ != first.field(column).type:
            raise ValueError(
                f"{path}: column '{column}' has type {type_}, expected {first.field(column).type} as in the first file"
            )


def _class_names(schema, column: str | None) -> tuple[str, ...]:
    """Names are a convenience: a description that cannot be understood must not keep good data from being read."""
    try:
        found = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    except (ValueError, RecursionError):
        return ()
    for key in ("info", "features", column, "names"):
        found = found.get(key) if isinstance(found, dict) else None
    return tuple(found) if isinstance(found, list) and all(isinstance(name, str) for name in found) else ()

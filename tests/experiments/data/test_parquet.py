import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from experiments.data.byte_corpus import ByteWindows, join_texts
from experiments.data.parquet import ParquetRecords
from experiments.data.pipeline import evaluation_batches, training_batches


def png(value, size=(5, 3)):
    buffer = io.BytesIO()
    Image.new("L", size, value).save(buffer, "PNG")
    return buffer.getvalue()


def image_table(values, names=("zero", "one", "two")):
    """A table as Hugging Face `datasets` writes one with an Image and a ClassLabel column."""
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": png(value), "path": f"{value}.png"} for value in values], kind)
    table = pa.table({"image": images, "label": pa.array([value % 3 for value in values], pa.int64())})
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


@pytest.fixture
def shards(tmp_path):
    for number, values in enumerate([range(0, 7), range(7, 9), range(9, 20)]):
        pq.write_table(image_table(values), tmp_path / f"train-{number:05}-of-00003.parquet", row_group_size=4)
    return tmp_path


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_rows_of_all_shards_in_any_order(shards, cache_bytes):
    source = ParquetRecords(str(shards / "train-*.parquet"), channels=1, cache_bytes=cache_bytes)
    assert len(source) == 20
    assert source.classes == ("zero", "one", "two")
    for index in np.random.default_rng(0).permutation(20):
        record = source[int(index)]
        assert record["image"].shape == (3, 5, 1)
        np.testing.assert_array_equal(record["image"], np.float32(index) / np.float32(255))
        assert (record["label"], record["label"].dtype) == (index % 3, np.int32)
    batch = source.take(np.array([19, 0, 8, 0]))
    np.testing.assert_array_equal(np.round(batch["image"][:, 0, 0, 0] * 255), [19, 0, 8, 0])
    np.testing.assert_array_equal(batch["label"], [1, 0, 2, 0])
    with pytest.raises(IndexError, match="row 20, expected 0 to 19"):
        source[20]


def test_cache_stays_within_its_limit_and_reads_once_where_all_fits(shards, monkeypatch):
    reads = []
    opened = ParquetRecords._open_group
    monkeypatch.setattr(ParquetRecords, "_open_group", lambda self, *place: reads.append(place) or opened(self, *place))
    source = ParquetRecords(shards / "train-*.parquet")
    for _ in range(3):
        source.take(np.random.default_rng(0).permutation(20))
    assert len(reads) == len(set(reads)) == 6
    reads.clear()
    source = ParquetRecords(shards / "train-*.parquet", cache_bytes=0)
    source.take(np.random.default_rng(0).permutation(20))
    assert len(reads) == 6
    assert len(source._cache) == 1


@pytest.mark.parametrize("threads", [0, 4])
def test_batches(shards, threads):
    source = ParquetRecords(shards / "train-*.parquet", size=(4, 4), channels=3)
    batch = next(iter(training_batches(source, batch_size=20, seed=0, threads=threads)))
    assert batch["image"].shape == (20, 4, 4, 3)
    np.testing.assert_array_equal(np.sort(np.round(batch["image"][:, 0, 0, 0] * 255)), np.arange(20))
    weights = [batch["weight"].sum() for batch in evaluation_batches(source, batch_size=8, threads=threads)]
    assert weights == [8, 8, 4]


def test_types_of_columns(tmp_path):
    path = tmp_path / "all.parquet"
    table = pa.table(
        {
            "text": ["a é", ""],
            "count": pa.array([3, -4], pa.int64()),
            "flag": [True, False],
            "score": pa.array([0.5, 0.25], pa.float64()),
            "tokens": pa.array([[1, 2, 3], [4]], pa.list_(pa.int64())),
            "pair": pa.array([[0.5, 1], [2, 3]], pa.list_(pa.float64(), 2)),
            "png": pa.array([png(10), png(20)], pa.binary()),
        }
    )
    pq.write_table(table, path)
    first, second = ParquetRecords(path)
    assert (first["text"], second["text"]) == ("a é", "")
    assert (first["count"].tolist(), first["count"].dtype, first["count"].shape) == (3, np.int32, ())
    assert (first["flag"].tolist(), second["flag"].dtype) == (1, np.int32)
    assert (first["score"].tolist(), first["score"].dtype) == (0.5, np.float32)
    assert (first["tokens"].tolist(), first["tokens"].dtype) == ([1, 2, 3], np.int32)
    assert (second["pair"].tolist(), second["pair"].dtype) == ([2, 3], np.float32)
    assert first["png"].shape == (3, 5, 3)
    chosen = ParquetRecords(path, columns={"image": "png", "label": "count"})
    assert chosen[1].keys() == {"image", "label"}
    with pytest.raises(ValueError, match=r"all\.parquet: 'tokens' has shapes \[\(1,\), \(3,\)\] within one batch"):
        ParquetRecords(path, columns={"tokens": "tokens"}).take(np.array([0, 1]))


def test_text_becomes_bytes_to_model(tmp_path):
    pq.write_table(pa.table({"text": ["some words", "ünïcode"]}), tmp_path / "text.parquet")
    data = join_texts(record["text"] for record in ParquetRecords(tmp_path / "text.parquet"))
    assert bytes(data) == "some words\0ünïcode\0".encode()
    batch = next(iter(training_batches(ByteWindows(data, 4), batch_size=3, seed=0, replacement=True)))
    assert batch["tokens"].shape == (3, 5)


def test_files_that_are_not_there_or_not_parquet_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none-\*\.parquet: no such file, and no file matches"):
        ParquetRecords(tmp_path / "none-*.parquet")
    with pytest.raises(FileNotFoundError, match="paths is empty"):
        ParquetRecords([])
    with pytest.raises(FileNotFoundError, match=r"gone\.parquet: no such file"):
        ParquetRecords([tmp_path / "gone.parquet"])
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: is a folder, expected a file"):
        ParquetRecords([tmp_path])
    path = tmp_path / "data.parquet"
    pq.write_table(image_table(range(5)), path)
    content = path.read_bytes()
    for broken in (b"", b"not parquet at all", content[:-1], content[: len(content) // 2], b"PAR1" + content[100:-4]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"data\.parquet: not a Parquet file, or truncated"):
            ParquetRecords(path)


def test_damaged_row_groups_are_named(tmp_path):
    path = tmp_path / "data.parquet"
    pq.write_table(image_table(range(5)), path, row_group_size=2)
    source = ParquetRecords(path)
    content = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(1).column(0).dictionary_page_offset
    content[start : start + 30] = b"\xff" * 30
    path.write_bytes(content)
    assert source[0]["label"] == 0
    with pytest.raises(ValueError, match=r"data\.parquet: row group 1 cannot be read, the file is corrupt"):
        source[2]


@pytest.mark.parametrize(
    "description",
    [
        '{"info": null}',
        '{"info": {"features": null}}',
        '{"info": {"features": {"label": {"names": null}}}}',
        '{"info": {"features": {"label": {"names": "cat"}}}}',
        '{"info": {"features": {"label": {"names": [1, 2]}}}}',
        '["info"]',
        '{"info": ',
        "[" * 100_000,
        b"\xff\xfe\xfd",
    ],
)
def test_a_description_that_cannot_be_understood_leaves_the_data_readable(tmp_path, description):
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"label": [2, 0]}).replace_schema_metadata({"huggingface": description}), path)
    source = ParquetRecords(path)
    assert source.classes == ()
    assert source[0]["label"] == 2


def test_flipped_bits_are_found_or_leave_records(tmp_path):
    path = tmp_path / "data.parquet"
    table = image_table(range(4)).append_column("text", pa.array(["añ", "b", "cö", "é"]))
    pq.write_table(table, path, row_group_size=2)
    whole = path.read_bytes()
    name = 8 * (whole.rindex(b"text") + 1) + 7  # makes the name of a column invalid UTF-8
    messages = []
    for place in [name, *np.random.default_rng(0).integers(0, 8 * len(whole), 60).tolist()]:
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            source = ParquetRecords(path)
            for index in range(len(source)):
                source[index]
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 10
    assert all(message.startswith(str(path)) for message in messages)


def test_wrong_counts_and_names_in_the_footer_are_refused(tmp_path):
    path = tmp_path / "data.parquet"
    pq.write_table(image_table(range(4)), path)
    source = ParquetRecords(path)
    source._starts = [0, 5]
    with pytest.raises(ValueError, match=r"data\.parquet: row group 0 has 4 rows, expected 5"):
        source[4]
    twice = pa.table([pa.array([1]), pa.array([2]), pa.array([3])], names=["label", "label", "other"])
    pq.write_table(twice, path)
    with pytest.raises(ValueError, match=r"data\.parquet: has several columns 'label'"):
        ParquetRecords(path)
    assert ParquetRecords(path, columns={"label": "other"})[0]["label"] == 3


def test_wrong_columns_are_refused(shards, tmp_path):
    with pytest.raises(
        ValueError, match=r"00000-of-00003\.parquet: has no column 'img', only image, label; .*columns="
    ):
        ParquetRecords(shards / "train-*.parquet", columns={"image": "img"})
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"image": ["a"], "label": [1]}), other)
    with pytest.raises(ValueError, match=r"other\.parquet: column 'image' has type string, expected struct<bytes"):
        ParquetRecords([shards / "train-00000-of-00003.parquet", other])
    pq.write_table(pa.table({"when": pa.array([1], pa.timestamp("s"))}), other)
    with pytest.raises(ValueError, match=r"other\.parquet: column 'when' has type timestamp.* expected an image"):
        ParquetRecords(other)
    pq.write_table(pa.table({"label": pa.array([], pa.int64())}), other)
    with pytest.raises(ValueError, match=r"other\.parquet: no rows"):
        ParquetRecords(other)


def test_wrong_values_are_named(tmp_path):
    path = tmp_path / "data.parquet"
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": None, "path": "a.png"}, {"bytes": b"broken", "path": "b.png"}, None], kind)
    table = pa.table({"image": images, "label": [1, None, 2**31], "list": [[1, None], [1], None]})
    pq.write_table(table, path)

    def read(column, row):
        return ParquetRecords(path, columns={"value": column})[row]

    for row in (0, 2):
        with pytest.raises(ValueError, match=rf"data\.parquet: column 'image', row {row} of row group 0: no bytes"):
            read("image", row)
    with pytest.raises(ValueError, match=r"column 'image', row 1 of row group 0: not a readable image"):
        read("image", 1)
    with pytest.raises(ValueError, match=r"column 'label', row 1 of row group 0: null, expected .* int64"):
        read("label", 1)
    with pytest.raises(ValueError, match=r"column 'label', row 2 of row group 0: 2147483648 does not fit into int32"):
        read("label", 2)
    for row in (0, 2):
        with pytest.raises(ValueError, match=rf"column 'list', row {row} of row group 0: null"):
            read("list", row)

"""Which columns of Parquet files are read, and that a cache never mixes in another one."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vfmtok_fast import cache
from vfmtok_fast.cache.format import index
from vfmtok_fast.cache.sources import open_source
from vfmtok_fast.cache.sources.columns import FIRST

SMALL = {"batch_size": 3, "shard_size": 4, "workers": 2}
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SOUND = pa.struct([("bytes", pa.binary()), ("sampling_rate", pa.int64())])


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((20, 20, 3), level, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(*levels, kind=PICTURE):
    values = [None if level is None else {"bytes": png(level)} for level in levels]
    return pa.array(values, kind)


def write(path, features=None, **columns):
    table = pa.table(columns)
    if features is not None:
        text = json.dumps({"info": {"features": {k: {"_type": v} for k, v in features.items()}}})
        table = table.replace_schema_metadata({"huggingface": text})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def levels(source):
    """Return the gray level and the label of every image."""
    found = []
    for entry in source.entries():
        with Image.open(io.BytesIO(source.read(entry))) as image:
            found.append((image.getpixel((0, 0))[0], entry.label))
    return found


@pytest.mark.parametrize("other", ["control_image", "mask", "thumbnail", "audio", "a"])
def test_the_column_named_image_wins_over_the_first(tmp_path, other):
    path = write(tmp_path / "q.parquet", **{other: pictures(9), "image": pictures(1), "label": [3]})
    assert levels(open_source(path)) == [(1, 3)]


@pytest.mark.parametrize(
    "features, wanted",
    [
        ({"image": "Audio", "scan": "Image"}, 2),
        ({"scan": "Image"}, 2),
        ({"scan": "Image", "image": "Image"}, 1),
        ({"scan": "Video"}, 1),
    ],
)
def test_what_hugging_face_says_comes_first(tmp_path, features, wanted):
    columns = {"scan": pictures(2), "image": pictures(1)}
    assert levels(open_source(write(tmp_path / "q.parquet", features, **columns)))[0][0] == wanted


@pytest.mark.parametrize(
    "columns, features",
    [
        ({"audio": pictures(1)}, None),
        ({"clip": pictures(1)}, {"clip": "Audio"}),
        ({"speech_wav": pictures(1, kind=SOUND)}, None),
        ({"image": pa.array([[1, 2]]), "n": [1]}, None),
    ],
)
def test_sounds_and_lists_are_no_pictures(tmp_path, columns, features):
    path = write(tmp_path / "q.parquet", features, **columns)
    with pytest.raises(
        ValueError, match=r"no pictures in it: .*; got \w+: (struct|list)<"
    ) as caught:
        open_source(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "columns, text, choice, wanted",
    [
        (
            {"img": pictures(1), "image": pictures(2)},
            "img, image could each be the pictures; choose one with --image-column",
            {"image_column": "image"},
            (2, -1),
        ),
        (
            {"left": pictures(1), "right": pictures(2)},
            "left, right could each be the pictures; choose one with --image-column",
            {"image_column": "right"},
            (2, -1),
        ),
        (
            {"jpg": [png(1)], "png": [png(2)]},
            "jpg, png could each be the pictures",
            {"image_column": "png"},
            (2, -1),
        ),
        (
            {"image": pictures(1), "label": [5], "class": [6]},
            "label, class could each be the labels; choose one with --label-column",
            {"label_column": "class"},
            (1, 6),
        ),
        (
            {"image": pictures(1), "label": ["cat"]},
            "column 'label' must hold class numbers, got string",
            {"label_column": "none"},
            (1, -1),
        ),
    ],
)
def test_where_two_could_be_meant_the_user_is_asked(tmp_path, columns, text, choice, wanted):
    path = write(tmp_path / "q.parquet", **columns)
    with pytest.raises(ValueError, match=text) as caught:
        open_source(path)
    assert "\n" not in str(caught.value)
    assert levels(open_source(path, **choice)) == [wanted]


def test_a_word_inside_another_is_no_sound(tmp_path):
    path = write(tmp_path / "q.parquet", invoice=pictures(1), voice_wav=pictures(2))
    assert levels(open_source(path)) == [(1, -1)]


def test_labels_by_feature_and_by_name(tmp_path):
    common = {"image": pictures(1), "species": [2], "count": [7]}
    source = open_source(write(tmp_path / "a.parquet", {"species": "ClassLabel"}, **common))
    assert levels(source) == [(1, 2)]
    assert levels(open_source(write(tmp_path / "b.parquet", **common))) == [(1, -1)]
    cifar = {"img": pictures(1), "fine_label": [4], "coarse_label": [1]}
    features = {"img": "Image", "fine_label": "ClassLabel", "coarse_label": "ClassLabel"}
    assert levels(open_source(write(tmp_path / "c.parquet", features, **cifar))) == [(1, 4)]
    both = {"image": pictures(1), "class": ["cat"], "label": [3]}
    assert levels(open_source(write(tmp_path / "d.parquet", **both))) == [(1, 3)]


@pytest.mark.parametrize("kind", [pa.large_binary(), pa.binary_view(), "dictionary"])
@pytest.mark.parametrize("inside", [True, False])
def test_every_kind_of_bytes(tmp_path, kind, inside):
    data = pa.array([png(1), None, png(2)], pa.binary())
    data = data.dictionary_encode() if kind == "dictionary" else data.cast(kind)
    if inside:
        data = pa.StructArray.from_arrays([data], ["bytes"])
    labels = pa.array([5, 6, 5]).dictionary_encode()
    source = open_source(write(tmp_path / "q.parquet", image=data, label=labels))
    entries = list(source.entries())
    assert [entry.label for entry in entries] == [5, 6, 5]
    assert (source.read(entries[0]), source.read(entries[2])) == (png(1), png(2))


def test_a_named_column_must_do(tmp_path):
    path = write(tmp_path / "q.parquet", image=pictures(1), text=["a"], label=[1])
    for choice, text in (
        ({"image_column": "text"}, "'text' .--image-column. must .*; got image: struct<"),
        ({"image_column": "none"}, "'none' .--image-column. must exist"),
        ({"label_column": "text"}, "'text' must hold class numbers, got string"),
        ({"label_column": "gone"}, "no column 'gone' .--label-column.; got image"),
    ):
        with pytest.raises(ValueError, match=text):
            open_source(path, **choice)
    with pytest.raises(ValueError, match="only Parquet has columns"):
        open_source(tmp_path, "folder", image_column="image")


def test_an_empty_file_or_column_does_not_decide(tmp_path):
    root = tmp_path / "q"
    write(root / "a.parquet", text=pa.array([], pa.string()))
    write(root / "b.parquet", image=pa.nulls(1), label=pa.nulls(1))
    write(root / "c.parquet", image=pictures(1, None), label=[4, None])
    source = open_source(root)
    entries = list(source.entries())
    assert [(entry.file, entry.label) for entry in entries] == [
        ("b.parquet", -1),
        ("c.parquet", 4),
        ("c.parquet", -1),
    ]
    assert source.read(entries[1]) == png(1)
    with pytest.raises(Exception, match="holds no bytes of a picture"):
        source.read(entries[0])


@pytest.mark.parametrize(
    "columns, features, text",
    [
        ({"photo": pictures(1), "label": [1]}, {}, "has no pictures in the column 'image'"),
        ({"image": pictures(1)}, {}, "has no class numbers in the column 'label'"),
    ],
)
def test_files_that_differ_are_refused(tmp_path, columns, features, text):
    write(tmp_path / "q" / "a.parquet", image=pictures(1), label=[1])
    write(tmp_path / "q" / "b.parquet", features, **columns)
    with pytest.raises(ValueError, match=f"b.parquet: {text}"):
        list(open_source(tmp_path / "q").entries())


def test_files_whose_classes_have_other_names_are_refused(tmp_path):
    for name, classes in (("a", ["cat", "dog"]), ("b", ["dog", "cat"])):
        path = write(tmp_path / "q" / f"{name}.parquet", image=pictures(1), label=[1])
        features = {"label": {"_type": "ClassLabel", "names": classes}}
        text = json.dumps({"info": {"features": features}})
        pq.write_table(pq.read_table(path).replace_schema_metadata({"huggingface": text}), path)
    with pytest.raises(ValueError, match=r"b\.parquet: the classes .* other names or numbers"):
        list(open_source(tmp_path / "q").entries())


def test_a_resumed_run_keeps_to_its_columns(tmp_path, tokenizer, fake):
    columns = {"left": pictures(1, 2, 3), "right": pictures(4, 5, 6), "label": [1, 0, 1]}
    path = write(tmp_path / "q.parquet", **columns, **{"class": [0, 0, 0]})
    right = {"image_column": "right", "label_column": "label"}
    out = tmp_path / "tokens"
    cache.build(path, out, tokenizer, **SMALL, **right)
    before = fake.read_tree(out)
    assert index.read_origin(out / "index.parquet").chosen == {"image_column": "right"}
    for other in ({"image_column": "left"}, {"label_column": "class"}, {"label_column": "none"}):
        with pytest.raises(cache.ImagesChanged, match=next(iter(other))) as caught:
            cache.build(path, out, tokenizer, **SMALL, **{**right, **other})
        assert "\n" not in str(caught.value)
    # verify and repair do not need the choice repeated.
    assert cache.verify(out, tokenizer, path).agreement == 1.0
    (out / "shards" / "tokens-00000.safetensors").unlink()
    assert cache.repair(path, out, tokenizer) == 1
    assert fake.read_tree(out) == before


def test_a_cache_of_the_first_column_goes_on_only_with_it(tmp_path, tokenizer, out):
    """Before columns could be chosen the first struct was taken, which no index records."""
    path = write(tmp_path / "q.parquet", mask=pictures(9, 8), image=pictures(1, 2), label=[0, 1])
    cache.build(path, out, tokenizer, **SMALL, image_column="mask")
    assert index.read_origin(out / "index.parquet").chosen == {}
    with pytest.raises(cache.ImagesChanged, match="image_column"):
        cache.build(path, out, tokenizer, **SMALL)
    assert levels(open_source(path, image_column=FIRST, label_column=FIRST)) == [(9, 0), (8, 1)]
    assert cache.verify(out, tokenizer, path).agreement == 1.0


def test_folders_that_say_the_class(tmp_path):
    for number in (10, 9, 3):
        write(tmp_path / "n" / f"label={number}" / "part-0.parquet", image=pictures(number))
    source = open_source(tmp_path / "n")
    assert levels(source) == [(10, 10), (3, 3), (9, 9)]
    assert len(source.classes(10)) == 11
    write(tmp_path / "s" / "class=dog" / "0.parquet", image=pictures(1))
    write(tmp_path / "s" / "class=cat" / "year=2020" / "0.parquet", image=pictures(2))
    write(tmp_path / "s" / "x" / "0.parquet", image=pictures(3))
    source = open_source(tmp_path / "s")
    assert levels(source) == [(2, 0), (1, 1), (3, -1)] and source.classes(1) == ["cat", "dog"]
    assert levels(open_source(tmp_path / "s", label_column="year"))[0] == (2, 2020)


def test_new_files_of_a_class_by_folder_keep_the_old_numbers(tmp_path, tokenizer, out):
    for name in ("cat", "dog"):
        write(tmp_path / "s" / f"class={name}" / "0.parquet", image=pictures(1))
    cache.build(tmp_path / "s", out, tokenizer, **SMALL)
    write(tmp_path / "s" / "class=dog" / "1.parquet", image=pictures(2))
    cache.build(tmp_path / "s", out, tokenizer, **SMALL, extend=True)
    assert index.read_rows(out / "index.parquet", 0).labels == [0, 1, 1]
    write(tmp_path / "s" / "class=ape" / "1.parquet", image=pictures(2))
    with pytest.raises(cache.ImagesChanged, match="changes the names or numbers"):
        cache.build(tmp_path / "s", out, tokenizer, **SMALL, extend=True)

"""A folder is a data set: where its captions come from, what does not fit, and what is wrong in one line."""

import json

import pytest
from PIL import Image

from atlas_diffusers.config import DatasetConfig
from atlas_diffusers.training import PictureDataset, load_training_data


def write(folder, names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(folder / name)
    return folder


def read(folder, **options):
    config = DatasetConfig(**{"root": str(folder), "resolution": 8, **options})
    return PictureDataset(load_training_data(config), config)


def captions(pictures):
    """Captions by the shade of the picture that carries them."""
    items = [pictures[i, 0] for i in range(len(pictures))]
    return {round(float(item["pixels"][0, 0, 0] + 1) * 127.5 / 40): item["text"] for item in items}


def test_captions_of_metadata(tmp_path):
    folder = write(tmp_path, ["a.png", "deep/b.jpg", "c.webp", "c.png"])
    rows = [("a.png", "one"), ("deep/b.jpg", "zwei – 漢字"), ("gone.png", "lost"), ("c.png", None)]
    text = "".join(json.dumps({"file_name": name, "text": text}, ensure_ascii=False) + "\n" for name, text in rows)
    (folder / "metadata.jsonl").write_text("\ufeff" + text, encoding="utf-8")
    (folder / "a.txt").write_text("not read: metadata goes first")
    pictures = read(folder)
    assert captions(pictures) == {0: "one", 1: "zwei – 漢字", 2: "", 3: ""}
    assert pictures.data.info.description == (
        "4 pictures, 2 with captions from metadata; 2 without one train with the empty caption: c.png, c.webp; "
        "1 captions without a picture: gone.png"
    )


def test_captions_of_csv_and_further_columns(tmp_path):
    folder = write(tmp_path, ["a.png", "b.png"])
    (folder / "metadata.csv").write_text('file_name,text,artist\na.png,"one, or two",me\nb.png,three,you\n', encoding="utf-8")
    pictures = read(folder)
    assert captions(pictures) == {0: "one, or two", 1: "three"} and list(pictures.data["artist"]) == ["me", "you"]
    assert captions(read(folder, caption_column="artist")) == {0: "me", 1: "you"}


def test_captions_beside_the_pictures(tmp_path):
    folder = write(tmp_path, ["a.png", "b.jpg", "c.png"])
    for name, text in (("a.txt", "one\n"), ("b.caption", "two"), ("readme.txt", "hello")):
        (folder / name).write_text(text)
    pictures = read(folder)
    assert captions(pictures) == {0: "one", 1: "two", 2: ""}
    assert "3 pictures, 2 with captions from the texts beside them" in pictures.data.info.description
    assert "1 captions without a picture: readme.txt" in pictures.data.info.description


def test_names_are_captions_where_asked_and_subfolders_are_labels(tmp_path):
    folder = write(tmp_path, ["big cats/snow_leopard-2.png", "birds/owl.png", "big cats/.hidden/x.png"])
    assert captions(read(folder)) == {0: "", 1: ""}
    assert captions(read(folder, captions="names")) == {0: "snow leopard 2", 1: "owl"}
    pictures = read(folder, captions="folders", label_column="label")
    assert captions(pictures) == {0: "big cats", 1: "birds"} and list(pictures.data["label"]) == [0, 1]
    assert [pictures[i, 0]["label"] for i in range(2)] == [0, 1]


def test_a_name_may_be_the_folder_and_a_subfolder_the_split(tmp_path, monkeypatch):
    write(tmp_path, ["mine/train/a.png", "mine/test/b.png", "mine/test/c.png"])
    monkeypatch.chdir(tmp_path)
    sizes = [len(load_training_data(DatasetConfig(name="mine", split=split))) for split in ("train", "test")]
    assert sizes == [1, 2]
    with pytest.raises(ValueError, match="no subfolder for split 'dev'"):
        read(tmp_path / "mine", split="dev")
    stream = load_training_data(DatasetConfig(name="mine", streaming=True, split="test"))
    assert [row["image"]["path"][-5:] for row in stream] == ["b.png", "c.png"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("metadata.jsonl", '{"file_name": "a.png", "text": "größe"}'.encode("latin-1"), "metadata.jsonl is not UTF-8"),
        ("metadata.jsonl", b'{"file_name": "a.png"\n', "metadata.jsonl, line 1: expected a file_name and a text"),
        ("metadata.jsonl", b'{"file_name": "a.png"}\n[1]\n', "metadata.jsonl, line 2: expected"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": 7}\n', "line 1: a.png has no caption, but 7"),
        ("metadata.csv", b"name,text\na.png,one\n", "metadata.csv, line 2: expected a file_name"),
        ("a.txt", b"\xff\xfe\xff", "a.txt is not UTF-8"),
    ],
)
def test_damaged_captions_are_named(tmp_path, name, content, message):
    write(tmp_path, ["a.png"])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


def test_folders_without_what_was_asked_for(tmp_path):
    with pytest.raises(OSError, match="folder .*nowhere does not exist"):
        read(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match="has no pictures in split 'train'"):
        read(tmp_path)
    write(tmp_path, ["a.png"])
    with pytest.raises(ValueError, match="captions='metadata': .* has neither metadata.jsonl nor metadata.csv"):
        read(tmp_path, captions="metadata")
    with pytest.raises(ValueError, match="no column 'label'"):
        read(tmp_path, label_column="label")


def test_imagefolders_with_metadata_that_is_not_utf_8_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "pictures", ["a.png"])
    (tmp_path / "pictures" / "metadata.jsonl").write_bytes('{"file_name": "a.png", "text": "größe"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="cannot be read .*UTF-8") as error:
        read(tmp_path / "pictures", name="imagefolder")
    assert "\n" not in str(error.value)


def test_data_that_cannot_be_read_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "pictures.parquet"
    file.write_bytes(b"PAR1 damaged")
    config = DatasetConfig(name=str(file))
    with pytest.raises(ValueError, match=r"pictures\.parquet' cannot be read") as error:
        load_training_data(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"name": "embedded:digits"}, {"name": "imagefolder", "root": "pictures"}])
def test_where_captions_come_from_is_asked_of_folders_only(options):
    with pytest.raises(ValueError, match="captions='names' is for a folder of pictures"):
        load_training_data(DatasetConfig(captions="names", **options))

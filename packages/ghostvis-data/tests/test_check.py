import json

import numpy as np
import pytest
from PIL import Image

from ghostvis_data import DataError, Sample
from ghostvis_data.check import check_dataset, check_folder, show_sample
from ghostvis_data.cli import main
from ghostvis_data.files import MANIFEST
from ghostvis_data.overlap import Held


@pytest.fixture
def photo(tmp_path):
    """The bytes of a picture with enough in it to be recognised, by number, size and format."""

    def make(number, size=(64, 48), kind="PNG", **options):
        rng = np.random.default_rng(number)
        picture = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        path = tmp_path / f"photo.{kind}"
        picture.save(path, kind, **options)
        return path.read_bytes()

    return make


def splits(write, folder, **named):
    """A folder with a data set for each split."""
    for split, samples in named.items():
        write(folder / split, samples)
    counts = {split: len(samples) for split, samples in named.items()}
    (folder / MANIFEST).write_text(json.dumps({"version": 1, "splits": counts, "source": {"name": "test"}}))
    return folder


def with_meta(sample, **meta):
    return Sample(sample.id, sample.messages, sample.text, sample.images, meta)


def test_counts_and_statistics(tmp_path, write, chat, photo, tokenizer):
    samples = [
        chat("a", "What?", "This.", [photo(1)]),
        chat("b", "Who?", "He.", [photo(2, (100, 50), "JPEG"), photo(3)]),
        chat("c"),
    ]
    findings = check_dataset(write(tmp_path / "d", samples), tokenizer, tokens_per_image=4)
    assert (findings.samples, findings.images, findings.turns, findings.problems) == (3, 3, 3, [])
    assert dict(findings.formats) == {"png": 2, "jpg": 1}
    assert sorted(findings.sides) == [64, 64, 100]
    assert dict(findings.images_per_sample) == {0: 1, 1: 1, 2: 1}
    assert findings.trained == sum(len(answer) + 1 for answer in ("This.", "He.", "This."))
    for words in ("longer side 64 to 100 px", "2 png, 1 jpg", "1 with 0, 1 with 1, 1 with 2", "trained on"):
        assert words in findings.report()


def test_a_sample_or_an_image_that_comes_twice_is_named(tmp_path, write, chat, photo):
    samples = [chat("a", images=[photo(1)]), chat("b", images=[photo(1)]), chat("c", "Else?", images=[photo(1)])]
    findings = check_dataset(write(tmp_path / "d", samples))
    assert (findings.repeated, findings.repeated_images, findings.problems) == (["b is a again"], 2, [])
    assert "1 samples equal to an earlier one; first: b is a again" in findings.report()


def test_a_broken_image_is_named_with_its_sample(tmp_path, write, chat, photo, capsys):
    write(tmp_path / "d", [chat("fine", images=[photo(1)]), chat("cut", images=[photo(2)[:60]])])
    assert main(["check", str(tmp_path / "d")]) == 1
    assert "d#cut, image 0: cannot read the image" in capsys.readouterr().out


def test_a_sample_with_nothing_to_train_on_is_named(tmp_path, write, tokenizer):
    findings = check_dataset(
        write(tmp_path / "d", [Sample("x", text="y"), Sample("empty", text="")], "text"), tokenizer
    )
    assert findings.problems == [f"{tmp_path / 'd'}#empty: no token to train on"]


def test_an_image_that_is_held_out_is_found_in_training(tmp_path, write, chat, photo, capsys):
    folder = splits(
        write,
        tmp_path / "d",
        train=[chat("a", images=[photo(1)]), chat("b", images=[photo(2)])],
        val=[chat("v", "Else?", images=[photo(2)])],
    )
    train, val = check_folder(folder)
    assert train.problems == [f"{folder / 'train'}#b: image 0 is held out for evaluation, as val#v"]
    assert val.problems == []
    assert main(["check", str(folder)]) == 1
    assert "held out for evaluation, as val#v" in capsys.readouterr().out


def test_a_scaled_copy_of_a_held_out_image_is_pointed_out(tmp_path, write, chat, photo):
    folder = splits(
        write,
        tmp_path / "d",
        train=[chat("copy", images=[photo(2, (256, 192), "JPEG", quality=90)]), chat("other", images=[photo(5)])],
        val=[chat("v", images=[photo(2, (128, 96))])],
    )
    (train, _) = check_folder(folder)
    assert (train.lookalikes, train.problems) == (["image 0 of copy and val#v"], [])
    flat = Image.new("RGB", (64, 48), "white")
    assert Held.look_of(flat) is None


def test_sets_that_share_photographs_are_compared_by_their_number(tmp_path, write, chat, photo):
    train = [
        with_meta(chat("a", images=[photo(1)]), image_id="coco/train2017/000000000042.jpg"),
        with_meta(chat("b", images=[photo(2)]), image_id="coco/train2017/000000000043.jpg"),
    ]
    write(tmp_path / "train", train)
    write(tmp_path / "held", [with_meta(chat("v", images=[photo(9)]), image_id=42)])
    (findings,) = check_folder(tmp_path / "train", against=[tmp_path / "held"])
    assert findings.problems == [f"{tmp_path / 'train'}#a: its image coco 42 is held out for evaluation, as held#v"]


def test_questions_and_passages_of_the_evaluation_are_found_in_texts(tmp_path, write, chat, capsys):
    question = "A train leaves at nine and another at ten; how far apart are they when both arrive at noon?"
    write(tmp_path / "held", [chat("q1", question), chat("q2", "How many?")])
    write(
        tmp_path / "web",
        [Sample("copied", text=f"Page 1. {question.upper()} Answer: 60."), Sample("own", text="Rivers.")],
        "text",
    )
    write(tmp_path / "chats", [chat("same", "how many"), chat("else", "How many trees?")])
    (findings,) = check_folder(tmp_path / "web", against=[tmp_path / "held"])
    assert findings.problems == [
        f"{tmp_path / 'web'}#copied: 13 words in a row are held out for evaluation, as held#q1"
    ]
    (findings,) = check_folder(tmp_path / "chats", against=[tmp_path / "held"])
    assert findings.problems == [f"{tmp_path / 'chats'}#same: its question is held out for evaluation, as held#q2"]
    assert main(["check", str(tmp_path / "web"), "--against", str(tmp_path / "held")]) == 1


def test_the_tiny_world_has_no_overlap(tiny_world):
    assert [findings.problems for findings in check_folder(tiny_world)] == [[]] * 5


def test_a_sample_is_shown_by_id_or_number_with_its_mask_in_colour(tmp_path, write, chat, photo, tokenizer):
    write(tmp_path / "d", [chat("first", images=[photo(1)]), chat("second", answer="That."), chat("0")])
    shown = show_sample(tmp_path / "d", "1", tokenizer, 4, colour=True)
    assert "d#second, number 1; images: none; 6 of" in shown
    assert "\x1b[" in shown
    assert "0 (64 x 48 png," in show_sample(tmp_path / "d", "first", tokenizer, 4, colour=False)
    assert "d#0, number 2" in show_sample(tmp_path / "d", "0", tokenizer, 4, colour=False)  # an id before a number
    with pytest.raises(DataError, match=r"no sample '7'[\s\S]*'first', or a number below 3[\s\S]*--sample first"):
        show_sample(tmp_path / "d", "7", tokenizer, 4, colour=False)


def test_the_contact_sheet_shows_broken_images_too(tmp_path, write, chat, photo):
    write(tmp_path / "d", [chat("fine", images=[photo(1)]), chat("cut", images=[photo(2)[:60]])])
    assert main(["inspect", str(tmp_path / "d"), str(tmp_path / "sheet.png")]) == 0
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert (pixels == (255, 0, 0)).all(axis=-1).any()


def test_a_jsonl_is_checked_before_it_is_built(tmp_path, write_jsonl, photo, capsys):
    (tmp_path / "a.png").write_bytes(photo(1))
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "This."}]
    source = write_jsonl(tmp_path / "my.jsonl", [{"messages": turns}] * 3)
    assert main(["check", str(source)]) == 0
    assert "3 chat samples, 3 images, nothing wrong" in capsys.readouterr().out
    (tmp_path / "a.png").write_bytes(b"<html>")
    assert main(["check", str(source), "--listing", str(tmp_path / "bad.tsv")]) == 1
    assert "3 of 3 lines" in capsys.readouterr().err
    rows = [line.split("\t") for line in (tmp_path / "bad.tsv").read_text().splitlines()]
    assert [(row[1], row[2]) for row in rows] == [(str(n), f"my-00000{n}") for n in (1, 2, 3)]
    assert all("a.png cannot be read" in row[3] for row in rows)


def test_check_and_inspect_go_on_behind_what_is_broken(tmp_path, write, chat, photo, capsys):
    data = write(tmp_path / "d", [chat("fine", images=[photo(1)]), chat("lost"), chat("odd"), chat("last")])
    shard = tmp_path / "d" / "shard-000000.tar"
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b'{"id":"lost"', b'{"ID":"lost"').replace(b'{"id":"odd"', b'["id","odd"'))
    assert main(["check", str(data.folder)]) == 1
    said = capsys.readouterr().out
    assert "its checksum is" in said
    assert "sample 1 is not the JSON of a sample (KeyError: 'id')" in said
    assert "sample 2 is not the JSON of a sample" in said
    assert "2 samples, 1 images" in said
    assert main(["inspect", str(data.folder), str(tmp_path / "sheet.png")]) == 0
    assert (np.asarray(Image.open(tmp_path / "sheet.png")) == (255, 0, 0)).all(axis=-1).any()


def test_addresses_are_checked_and_looked_at_like_folders(tmp_path, monkeypatch, write, chat, photo, serve, capsys):
    monkeypatch.setenv("GHOSTVIS_HOME", str(tmp_path / "home"))
    splits(write, tmp_path / "d", train=[chat("a", images=[photo(1)])], val=[chat("v", "Else?", images=[photo(1)])])
    with serve(tmp_path) as server:
        assert main(["check", f"{server.url}/d"]) == 1
        assert f"{server.url}/d/train#a: image 0 is held out for evaluation, as val#v" in capsys.readouterr().out
        assert main(["check", f"{server.url}/d/train", "--against", f"pipe:cat {tmp_path}/d/val/{{}}"]) == 1
        assert main(["inspect", f"{server.url}/d", str(tmp_path / "sheet.png")]) == 0
        assert main(["check", f"{server.url}/nothing"]) == 1
    assert "has no dataset.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        (["check", "gone.jsonl"], "there is no file gone.jsonl"),
        (["check", "gone"], "there is no folder gone"),
        (["check", "gsm8k"], "ghostvis-data check gsm8k --root FOLDER"),
        (["check", "."], "is not a data set: it has no dataset.json"),
        (["inspect", "gone", "sheet.png"], "there is no folder gone"),
        (["check", "empty.jsonl"], "has no lines"),
        (["check", "latin.jsonl"], "iconv -f latin1"),
        (["check", "latin.jsonl"], "ghostvis-data check latin.jsonl --listing bad.tsv"),
    ],
)
def test_what_is_no_data_is_said_in_a_sentence(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "latin.jsonl").write_bytes('{"id":"l","text":"caf\xe9"}\n'.encode("latin-1"))
    assert main(words) == 1
    found = capsys.readouterr().err
    assert said in found
    assert found.startswith("ghostvis: ")
    assert "  try      " in found

import json
import shlex

import numpy as np
import pytest
import tyro
from PIL import Image

from ghostvis_data import BuildOptions, DataError, Dataset, ShardWriter, build_jsonl
from ghostvis_data.cli import Build, Check, Command, Inspect, main
from ghostvis_model.images import load_image


def turn(*images, answer="A cat."):
    content = [*({"type": "image", "image": name} for name in images), {"type": "text", "text": "What?"}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


@pytest.fixture
def photos(tmp_path):
    """Pictures of every awkward kind."""
    noise = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    rgb = Image.fromarray(noise)
    turned = Image.Exif()
    turned[274] = 6
    rgb.convert("L").save(tmp_path / "grey.jpg")
    rgb.convert("RGBA").save(tmp_path / "alpha.png")
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg")
    rgb.convert("P").save(tmp_path / "palette.gif")
    Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    rgb.save(tmp_path / "turned.jpg", exif=turned)
    rgb.resize((1, 1)).save(tmp_path / "one.webp")
    rgb.save(tmp_path / "old.bmp")
    rgb.resize((400, 300)).save(tmp_path / "large.jpg", exif=turned)
    return sorted(path.name for path in tmp_path.iterdir())


def test_photographs_of_every_kind_come_out_as_they_look(tmp_path, photos, write_jsonl):
    source = write_jsonl(tmp_path / "my.jsonl", [{"id": name, "messages": turn(name)} for name in photos])
    report = build_jsonl(source, tmp_path / "out", BuildOptions(max_side=100))
    assert sum(report.samples.values()) == report.images == len(photos)
    for split in ("train", "val"):
        for sample in Dataset(tmp_path / "out" / split):
            before, after = load_image(tmp_path / sample.id), load_image(sample.images[0])
            if sample.id == "large.jpg":
                assert after.size == (75, 100)  # turned upright, then scaled
            else:
                assert np.array_equal(np.asarray(before), np.asarray(after)), sample.id
            stored_as_is = sample.id.endswith((".jpg", ".png", ".webp")) and sample.id != "large.jpg"
            assert (sample.images[0] == (tmp_path / sample.id).read_bytes()) == stored_as_is


def test_any_number_of_images_and_ids_of_every_form(tmp_path, photos, write_jsonl):
    records = [
        {"messages": turn()},
        {"id": 7, "messages": turn("grey.jpg", "alpha.png", "grey.jpg"), "meta": {"from": "here"}},
    ]
    build_jsonl(write_jsonl(tmp_path / "my.jsonl", records), tmp_path / "out", val_fraction=0)
    plain, three = Dataset(tmp_path / "out" / "train")
    assert (plain.id, plain.images, three.id, three.meta) == ("my-000001", [], "7", {"from": "here"})
    assert three.messages is not None
    assert [p["image"] for p in three.messages[0]["content"] if p["type"] == "image"] == [0, 1, 0]
    assert len(three.images) == 2


def test_the_same_jsonl_gives_the_same_bytes(tmp_path, photos, write_jsonl):
    source = write_jsonl(tmp_path / "my.jsonl", [{"messages": turn(name)} for name in photos * 3])
    for name in ("a", "b"):
        build_jsonl(source, tmp_path / name, BuildOptions(max_side=100, shard_bytes=4000))
    same_bytes(tmp_path / "a", tmp_path / "b")


def test_samples_stay_in_their_split_when_others_are_added(tmp_path, write_jsonl):
    def val_ids(count, folder):
        source = write_jsonl(tmp_path / "my.jsonl", [{"id": f"s{n}", "messages": turn()} for n in range(count)])
        build_jsonl(source, folder, val_fraction=0.2)
        return {sample.id for sample in Dataset(folder / "val")}

    few, many = val_ids(100, tmp_path / "few"), val_ids(200, tmp_path / "many")
    assert 8 < len(few) < 35
    assert few == {name for name in many if int(name[1:]) < 100}
    for count in (2, 3):
        assert 1 <= len(val_ids(count, tmp_path / f"{count}")) < count
    source = write_jsonl(tmp_path / "my.jsonl", [{"messages": turn()}])
    assert build_jsonl(source, tmp_path / "single").samples == {"train": 1}


def same_bytes(one, other):
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    assert len(files) > 6
    assert [name for name in files if (one / name).read_bytes() != (other / name).read_bytes()] == []


BAD = {
    "missing image": ({"messages": turn("nowhere.jpg")}, r"nowhere\.jpg does not exist"),
    "folder as image": ({"messages": turn("folder")}, "is a folder"),
    "unreadable image": ({"messages": turn("page.jpg")}, r"page\.jpg cannot be read"),
    "cut image": ({"messages": turn("cut.png")}, r"cut\.png cannot be read"),
    "no assistant turn": ({"messages": turn()[:1]}, "no assistant turn"),
    "empty answer": ({"messages": turn(answer="")}, "answer, is empty"),
    "bad JSON": ('{"messages": [', "not JSON"),
    "not UTF-8": ('"\\ud800"', "not JSON|half of|a JSON str"),
    "half a pair": ({"messages": turn(answer="\ud800")}, "UTF-16"),
    "unknown role": ({"messages": [{"role": "human", "content": "x"}]}, "'human'"),
    "unknown key": ({"messages": turn(), "image": "grey.jpg"}, "the key 'image'"),
    "neither": ({"id": "x"}, "neither messages nor text"),
    "a list": ("[]", "a JSON list"),
    "image that is no path": ({"messages": turn(3)}, "the image 3"),
    "wrong kind": ({"text": "a document"}, "a text line"),
    "bad id": ({"id": None, "messages": turn()}, "the id None"),
    "id twice": ({"id": "good", "messages": turn()}, "the id of line 1 again"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named_and_nothing_is_written(tmp_path, photos, write_jsonl, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    (tmp_path / "cut.png").write_bytes((tmp_path / "alpha.png").read_bytes()[:500])
    record, pattern = BAD[name]
    good = {"id": "good", "messages": turn("grey.jpg")}
    source = write_jsonl(tmp_path / "my.jsonl", [good, {"messages": turn()}, "", record])
    before = set(tmp_path.iterdir())
    with pytest.raises(DataError, match=rf"1 of 3 lines of .*my\.jsonl[\s\S]*line 4[\s\S]*({pattern})") as error:
        build_jsonl(source, tmp_path / "out")
    for row in ("expected", "likely", "try", "--skip-bad"):
        assert row in str(error.value)
    assert set(tmp_path.iterdir()) == before
    report = build_jsonl(source, tmp_path / "out", BuildOptions(skip_bad=True))
    assert (report.samples, [line.line for line in report.left_out]) == ({"train": 1, "val": 1}, [4])
    assert [line["line"] for line in json.loads((tmp_path / "out" / "dataset.json").read_text())["left_out"]] == [4]
    assert sum(len(Dataset(tmp_path / "out" / split)) for split in ("train", "val")) == 2


def test_all_bad_lines_are_listed_up_to_twenty_and_counted(tmp_path, write_jsonl):
    source = write_jsonl(tmp_path / "my.jsonl", [{"messages": turn(f"{n}.jpg")} for n in range(30)] + ["{"])
    with pytest.raises(DataError) as error:
        build_jsonl(source, tmp_path / "out")
    assert "31 of 31 lines" in str(error.value)
    assert str(error.value).count("does not exist") == 20
    assert "and 11 more" in str(error.value)
    assert "--skip-bad" not in str(error.value)  # nothing would be left
    with pytest.raises(DataError):
        build_jsonl(source, tmp_path / "out", BuildOptions(skip_bad=True))
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_never_touched(tmp_path, write_jsonl):
    source = write_jsonl(tmp_path / "my.jsonl", [{"messages": turn()}])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="not empty"):
        build_jsonl(source, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_what_a_killed_build_left_is_built_anew(tmp_path, write_jsonl):
    source = write_jsonl(tmp_path / "my.jsonl", [{"messages": turn()}])
    (tmp_path / ".out.building" / "train").mkdir(parents=True)
    (tmp_path / ".out.building" / "train" / "shard-000000.tar").write_text("half")
    build_jsonl(source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"my.jsonl", "out"}


def test_texts_are_built_too(tmp_path, write_jsonl):
    source = write_jsonl(tmp_path / "my.jsonl", [{"text": f"Document {n}."} for n in range(5)])
    build_jsonl(source, tmp_path / "out", val_fraction=0)
    data = Dataset(tmp_path / "out" / "train")
    assert (data.kind, list(data.texts())) == ("text", [f"Document {n}." for n in range(5)])


def test_the_command_builds_checks_and_draws(tmp_path, photos, write_jsonl, tokenizer, capsys):
    source = write_jsonl(tmp_path / "my.jsonl", [{"id": name, "messages": turn(name)} for name in photos])
    out = str(tmp_path / "out")
    assert main(["build", str(source), out, "--processes", "1"]) == 0
    assert main(["check", str(source)]) == 0
    tokenizer.save(tmp_path / "tokenizer")
    options = ["--tokenizer", str(tmp_path / "tokenizer"), "--tokens-per-image", "4"]
    assert main(["check", out, *options]) == 0
    assert "trained on" in capsys.readouterr().out
    assert main(["check", out, "--sample", "deep.png", *options]) == 0
    assert "<|image|> x 4" in capsys.readouterr().out
    assert main(["inspect", out, str(tmp_path / "sheet.png")]) == 0
    assert Image.open(tmp_path / "sheet.png").width > 1000


def test_the_examples_of_help_are_commands_it_takes():
    examples = [
        line.strip()
        for about in (Build, Check, Inspect)
        for line in str(about.__doc__).splitlines()
        if line.strip().startswith("ghostvis-data ")
    ]
    assert len(examples) == 8
    for example in examples:
        name, *arguments = shlex.split(example)
        assert name == "ghostvis-data"
        tyro.cli(Command, args=arguments)


@pytest.mark.parametrize(
    "sample, command",
    [({"text": "a"}, "ghostvis-train base --depth 8"), ({"messages": turn()}, "ghostvis-train sft --data-recipe")],
)
def test_after_a_build_the_next_command_fits_the_data(tmp_path, write_jsonl, capsys, sample, command):
    source = write_jsonl(tmp_path / "my.jsonl", [sample])
    assert main(["build", str(source), str(tmp_path / "out"), "--val-fraction", "0", "--processes", "1"]) == 0
    commands = [line for line in capsys.readouterr().out.splitlines() if "ghostvis-train" in line]
    assert command in commands[-1]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["build", "nowhere.jsonl", "out"], "there is no file nowhere.jsonl"),
        (["check", "nowhere"], "there is no folder nowhere"),
        (["check", "out", "--sample", "x"], "there is no folder out"),
        (["inspect", "nowhere", "x.png"], "there is no folder nowhere"),
    ],
)
def test_a_users_error_is_printed_without_a_traceback(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("ghostvis: ")
    assert words in printed.err
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_behind(tmp_path, write_jsonl, monkeypatch, capsys):
    source = write_jsonl(tmp_path / "my.jsonl", [{"messages": turn()}])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert main(["build", str(source), str(tmp_path / "out")]) == 1
    assert "No space left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["my.jsonl"]


def test_a_build_stopped_by_ctrl_c_goes_on_where_it_stopped(tmp_path, photos, write_jsonl, monkeypatch):
    source = write_jsonl(tmp_path / "my.jsonl", [{"messages": turn(name)} for name in photos * 3])
    options = BuildOptions(max_side=100, shard_bytes=4000)
    build_jsonl(source, tmp_path / "unbroken", options)

    def stop(done, total):
        if done == total - 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_jsonl(source, tmp_path / "out", options, on_progress=stop)
    assert not (tmp_path / "out").exists()
    written = []
    monkeypatch.setattr(
        ShardWriter, "write", lambda self, sample, write=ShardWriter.write: written.append(write(self, sample))
    )
    build_jsonl(source, tmp_path / "out", options)
    assert 0 < len(written) < len(photos)
    assert not (tmp_path / ".out.building").exists()
    same_bytes(tmp_path / "unbroken", tmp_path / "out")


def test_a_source_that_changed_is_not_mixed_with_what_an_interrupted_build_left(tmp_path, write_jsonl):
    def build(answer, stop):
        records = [{"messages": turn(answer=f"{answer} {n}")} for n in range(20)]
        source = write_jsonl(tmp_path / "my.jsonl", records)
        build_jsonl(source, tmp_path / "out", BuildOptions(shard_bytes=4000), on_progress=stop)

    def stop(done, total):
        if done == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build("old", stop)
    build("new", None)
    for split in ("train", "val"):
        assert all("new" in sample.messages[1]["content"] for sample in Dataset(tmp_path / "out" / split))


def test_two_processes_write_the_bytes_of_one(tmp_path, photos, write_jsonl):
    source = write_jsonl(tmp_path / "my.jsonl", [{"messages": turn(name)} for name in photos * 3])
    for processes in (1, 2):
        progress = []
        build_jsonl(
            source,
            tmp_path / f"by{processes}",
            BuildOptions(max_side=100, shard_bytes=4000, processes=processes),
            on_progress=lambda done, total, seen=progress: seen.append((done, total)),
        )
        assert progress[-1] == (27, 27)
    same_bytes(tmp_path / "by1", tmp_path / "by2")


def test_a_damaged_image_is_found_by_check(tmp_path, write, chat, png, capsys):
    write(tmp_path / "d", [chat("fine", images=[png()]), chat("cut", images=[png()[:40]])])
    assert main(["check", str(tmp_path / "d")]) == 1
    assert "d#cut, image 0" in capsys.readouterr().out

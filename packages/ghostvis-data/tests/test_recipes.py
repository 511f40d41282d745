import json
from contextlib import closing

import pytest
import torch

from ghostvis_data import (
    DataError,
    Dataset,
    Question,
    Sample,
    Stream,
    TinyWorldSizes,
    build_jsonl,
    build_tiny_world,
    get_task,
    open_recipe,
    summarize,
    tiny_world_folder,
    wilson,
)
from ghostvis_data.readers import SETS
from ghostvis_data.recipes import NAMED, PHASES, RECIPES, describe_recipes, recipe_id, sets_folder, short_name

SIZES = TinyWorldSizes(6, 5, 4, 3)


def test_the_tiny_world_is_rendered_once_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("GHOSTVIS_HOME", str(tmp_path))
    seen = []
    recipe = open_recipe("tiny_world", seed=2, sizes=SIZES, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (23, 23)
    again = open_recipe("tiny_world", seed=2, sizes=SIZES, on_progress=lambda *_: pytest.fail("rendered again"))
    assert again == recipe
    sizes = {phase: len(recipe.datasets(phase)[0]) for phase in recipe.phases}
    assert sizes == {"tokenizer": 6, "vision": 5, "base": 6, "align": 5, "sft": 5}
    assert {name: len(recipe.evaluation(name)) for name in recipe.evaluations} == {"test": 4, "combinations": 3}
    assert tiny_world_folder(2, SIZES) != tiny_world_folder(3, SIZES)
    assert tiny_world_folder(2, SIZES) != tiny_world_folder(2)


def test_the_tiny_world_is_the_same_bytes_everywhere(tmp_path):
    for name in ("a", "b"):
        build_tiny_world(tmp_path / name, 1, SIZES)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 16
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    assert open_recipe(tmp_path / "a").task.name == "tiny_world"


def test_captions_and_questions_show_the_same_pictures(tiny_world):
    captions, train = Dataset(tiny_world / "captions"), Dataset(tiny_world / "train")
    assert [captions.images(i) for i in range(5)] == [train.images(i) for i in range(5)]
    assert train.record(0).meta["cell_colours"] == captions.record(0).meta["cell_colours"]


def test_an_unknown_recipe_lists_the_known_ones_and_how_to_make_one():
    with pytest.raises(DataError, match=r"tiny_wrld[\s\S]*tiny_world[\s\S]*typing error[\s\S]*ghostvis-data build"):
        open_recipe("tiny_wrld")


def test_a_file_of_samples_given_as_a_recipe_is_told_to_be_built(tmp_path, monkeypatch, write_jsonl):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "my.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match=r"ghostvis-data build my\.jsonl my, then --data-recipe my"):
        open_recipe("my.jsonl")


def test_texts_given_to_fine_tuning_are_sent_to_pretraining(tmp_path, write_jsonl):
    build_jsonl(write_jsonl(tmp_path / "my.jsonl", [{"text": "a"}]), tmp_path / "out", val_fraction=0)
    with pytest.raises(DataError, match=r"no data for the phase sft[\s\S]*ghostvis-train base --depth") as error:
        open_recipe(tmp_path / "out").datasets("sft")
    assert "ghostvis-train sft" not in str(error.value)


def test_a_built_folder_is_a_recipe_for_fine_tuning(tmp_path, write_jsonl):
    messages = [{"role": "user", "content": "Say a."}, {"role": "assistant", "content": "a"}]
    source = write_jsonl(tmp_path / "my.jsonl", [{"messages": messages}] * 4)
    build_jsonl(source, tmp_path / "out", val_fraction=0.01)
    recipe = open_recipe(tmp_path / "out")
    assert (len(recipe.datasets("sft")[0]), len(recipe.evaluation("val"))) == (3, 1)
    assert recipe.shares("sft") is None
    with pytest.raises(DataError, match=r"no data for the phase base[\s\S]*--source mid"):
        recipe.datasets("base")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no dataset"):
        open_recipe(tmp_path / "empty")


def test_the_recipe_that_is_shown_as_an_example_can_be_used(tmp_path, monkeypatch, write, write_jsonl):
    published(monkeypatch, tmp_path, write, "smoltalk/train")
    messages = [{"role": "user", "content": "Say a."}, {"role": "assistant", "content": "a"}]
    build_jsonl(
        write_jsonl(tmp_path / "my.jsonl", [{"messages": messages}] * 4), tmp_path / "my_data", val_fraction=0.3
    )
    shown = describe_recipes().partition("mix.toml:\n")[2]
    (tmp_path / "mix.toml").write_text(shown)
    recipe = open_recipe(tmp_path / "mix.toml")
    assert recipe.shares("sft") == [0.7, 0.3]
    assert recipe.task_of("my_data/val").name == "exact_match"


def published(monkeypatch, tmp_path, write, *names):
    """Data sets where named recipes look for them: a sample each."""
    monkeypatch.setenv("GHOSTVIS_HOME", str(tmp_path / "home"))
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for name in names:
        write(sets_folder() / name, [Sample("s", turns)])


def test_a_named_recipe_mixes_by_share_and_scores_each_set_by_its_task(tmp_path, monkeypatch, write):
    published(monkeypatch, tmp_path, write, *NAMED["vision_sft"]["sft"], *NAMED["vision_sft"]["evaluate"])
    recipe = open_recipe("vision_sft")
    assert recipe.shares("sft") == [0.55, 0.25, 0.1, 0.1]
    folders = [dataset.folder.parent.name for dataset in recipe.datasets("sft")]
    assert folders == ["llava_instruct", "vqav2", "textvqa", "chartqa"]
    assert {name: recipe.task_of(name).name for name in recipe.evaluations} == {
        "vqav2/val": "vqav2",
        "textvqa/val": "textvqa",
        "chartqa/test": "chartqa",
    }
    assert recipe.baseline_of("chartqa/test") == sets_folder() / "chartqa" / "train"
    assert "built" in describe_recipes()


def test_a_named_recipe_without_its_sets_says_how_to_build_each(tmp_path, monkeypatch, write):
    published(monkeypatch, tmp_path, write, "vqav2/train", "vqav2/val", "textvqa/train", "textvqa/val")
    with pytest.raises(DataError) as error:
        open_recipe("vision_sft")
    home = tmp_path / "home" / "data" / "sets"
    assert "needs 3 data sets that are not here: llava_instruct/train, chartqa/train, chartqa/test" in str(error.value)
    assert f"ghostvis-data build chartqa {home / 'chartqa'}   # licence: GPL-3.0" in str(error.value)
    assert f"ghostvis-data build llava_instruct {home / 'llava_instruct'} --root" in str(error.value)


def test_a_set_whose_splits_come_from_two_places_is_built_by_one_command(tmp_path, monkeypatch):
    monkeypatch.setenv("GHOSTVIS_HOME", str(tmp_path))
    with pytest.raises(DataError) as error:
        open_recipe("vision_sft")  # of VQAv2 the hub has only the validation split
    assert [line.split("   #")[0].strip() for line in str(error.value).splitlines() if "build vqav2" in line] == [
        f"ghostvis-data build vqav2 {sets_folder() / 'vqav2'} --root FOLDER_WITH_ITS_FILES"
    ]


def test_every_named_recipe_has_shares_of_one_and_known_sets_tasks_and_phases():
    assert set(RECIPES) == {"tiny_world", *NAMED}
    for phases in NAMED.values():
        for phase, listed in phases.items():
            assert {name.split("/")[0] for name in listed} <= set(SETS)
            if phase == "evaluate":
                assert [get_task(task).name for task in listed.values()] == list(listed.values())
            else:
                assert phase in PHASES
                assert sum(listed.values()) == pytest.approx(1.0)


OWN_RECIPE = """
[sft]
"my_data/train" = 3
"vqav2/train" = 1

[evaluate]
"my_data/val" = "yes_no.py"
"vqav2/val" = "vqav2"
"""


def test_an_own_recipe_is_one_small_file(tmp_path, monkeypatch, write, chat):
    published(monkeypatch, tmp_path, write, "vqav2/train", "vqav2/val")
    for split in ("train", "val"):
        write(tmp_path / "here" / "my_data" / split, [chat("s")])
    (tmp_path / "here" / "mix.toml").write_text(OWN_RECIPE)
    task = 'from ghostvis_data.tasks import *\nTASK = Task("yes_no", listed_questions, stripped, lambda a, q: 1.0)\n'
    (tmp_path / "here" / "yes_no.py").write_text(task)
    recipe = open_recipe(tmp_path / "here" / "mix.toml")
    assert recipe.shares("sft") == [3, 1]
    assert [dataset.folder for dataset in recipe.datasets("sft")] == [
        tmp_path / "here" / "my_data" / "train",
        sets_folder() / "vqav2" / "train",
    ]
    tasks = {name: recipe.task_of(name).name for name in recipe.evaluations}
    assert tasks == {"my_data/val": "yes_no", "vqav2/val": "vqav2"}


def two_splits(folder, write, chat):
    """A data set of two splits, as `ghostvis-data build` makes it."""
    for split, count in (("train", 9), ("val", 2)):
        write(folder / split, [chat(f"{split}{n}", "q" * n) for n in range(count)])
    manifest = {"version": 1, "splits": {"train": 9, "val": 2}, "source": {"name": "jsonl"}}
    (folder / "dataset.json").write_text(json.dumps(manifest))
    return folder


def batches(datasets, shares, tokenizer):
    with Stream(datasets, tokenizer, row_tokens=64, rows_per_step=2, shares=shares) as stream:
        return [tensor for step in range(stream.steps(2)) for b in stream.micro_batches(step) for tensor in b.tensors()]


def test_a_recipe_mixes_data_from_web_addresses_and_programs_with_data_that_is_here(
    tmp_path, monkeypatch, write, chat, serve, tokenizer
):
    monkeypatch.setenv("GHOSTVIS_HOME", str(tmp_path / "home"))
    for name in ("web", "piped", "here"):
        two_splits(tmp_path / name, write, chat)
    with serve(tmp_path) as server:
        pipe = f"pipe:cat {tmp_path / 'piped'}/train/{{}}"
        lines = [f'"{server.url}/web/train" = 2', f"'{pipe}' = 1", '"here/train" = 1']
        lines += ["[evaluate]", f'"{server.url}/web/val" = "exact_match"', '"here/val" = "exact_match"']
        (tmp_path / "mix.toml").write_text("\n".join(["[sft]", *lines]))
        recipe = open_recipe(tmp_path / "mix.toml")
        datasets = recipe.datasets("sft")
        assert [dataset.opened for dataset in datasets] == [f"{server.url}/web/train", pipe, f"{tmp_path}/here/train"]
        assert recipe.shares("sft") == [2, 1, 1]
        local = [Dataset(tmp_path / name / "train") for name in ("web", "piped", "here")]
        pairs = zip(batches(datasets, [2, 1, 1], tokenizer), batches(local, [2, 1, 1], tokenizer), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert [sample.id for sample in recipe.evaluation(f"{server.url}/web/val")] == ["val0", "val1"]
        assert recipe.baseline_of(f"{server.url}/web/val") == f"{server.url}/web/train"
        (tmp_path / "gone.toml").write_text(f'[sft]\n"{server.url}/nothing/train" = 1')
        with pytest.raises(DataError, match=r"/nothing/train is not a data set: it has no dataset\.json"):
            open_recipe(tmp_path / "gone.toml")
        for dataset in datasets:
            dataset.close()


def test_the_address_of_a_built_folder_is_a_recipe(tmp_path, monkeypatch, write, chat, serve):
    monkeypatch.setenv("GHOSTVIS_HOME", str(tmp_path / "home"))
    two_splits(tmp_path / "web", write, chat)
    with serve(tmp_path) as server:
        for address in (f"{server.url}/web", f"pipe:cat {tmp_path}/web/{{}}"):
            recipe = open_recipe(address)
            with closing(recipe.datasets("sft")[0]) as train, closing(recipe.evaluation("val")) as held_out:
                assert (len(train), len(held_out)) == (9, 2)
            assert recipe_id(address) == address
            assert short_name(address) == "web"


def test_a_set_for_evaluation_alone_is_no_recipe(tmp_path, write, chat):
    write(tmp_path / "d" / "test", [chat("a")])
    (tmp_path / "d" / "dataset.json").write_text('{"version": 1, "splits": {"test": 1}, "source": {}}')
    with pytest.raises(DataError, match=r"no split to train on, only test[\s\S]*\[evaluate\]"):
        open_recipe(tmp_path / "d")


@pytest.mark.parametrize(
    "content, pattern",
    [
        ("[sft", "not TOML"),
        ("", "no phase"),
        ("[soft]\na = 1", r"a table \[soft\][\s\S]*one of tokenizer"),
        ("[sft]\n", "lists nothing"),
        ('[sft]\n"d" = 0', r'"d" = 0[\s\S]*above 0'),
        ('[sft]\n"d" = true', "a share of the tokens"),
        ('[sft]\n"d" = 1\n[evaluate]\n"e" = 2', "the name of a task"),
        ('[sft]\n"gone/train" = 1', r"1 data sets that are not here: gone/train[\s\S]*ghostvis-data build my\.jsonl"),
    ],
)
def test_a_recipe_file_that_cannot_be_used_says_why(tmp_path, content, pattern):
    (tmp_path / "mix.toml").write_text(content)
    with pytest.raises(DataError, match=pattern):
        open_recipe(tmp_path / "mix.toml")


def test_a_folder_of_a_published_set_is_scored_by_its_task(tmp_path, write, chat):
    write(tmp_path / "gsm" / "train", [chat("a")])
    source = {"version": 1, "splits": {"train": 1}, "source": {"name": "gsm8k"}}
    (tmp_path / "gsm" / "dataset.json").write_text(json.dumps(source))
    assert open_recipe(tmp_path / "gsm").task.name == "gsm8k"


def test_evaluation_asks_each_question_alone_with_its_picture(tiny_world):
    task, data = get_task("tiny_world"), Dataset(tiny_world / "test")
    questions = [question for sample in data for question in task.questions(sample)]
    assert len(questions) > 2 * len(data)
    for question in questions:
        assert [message["role"] for message in question.messages] == ["user"]
        assert question.images[0].startswith(b"\x89PNG")
        assert question.text.endswith("?")
        assert task.judge(f" {question.answer.upper()}. ", question) == 1.0
        assert task.judge("", question) == task.judge(" . ", question) == task.judge("elephant", question) == 0.0


def test_the_majority_answer_comes_from_training_and_ties_are_settled():
    samples = [
        Sample(str(n), meta={"questions": [{"type": "colour", "question": "?", "answer": answer}]})
        for n, answer in enumerate(["red", "Blue", "blue.", "red"])
    ]
    assert get_task("tiny_world").majority(samples) == {"colour": "blue"}


def test_a_users_own_validation_asks_every_turn_after_the_true_history():
    messages = [
        {"role": "user", "content": [{"type": "image", "image": 0}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat"},
        {"role": "user", "content": "Colour?"},
        {"role": "assistant", "content": [{"type": "text", "text": "black"}]},
    ]
    first, second = get_task("exact_match").questions(Sample("s", messages, images=[b"picture"]))
    assert (first.answer, second.answer) == ("A cat", "black")
    assert first.images == second.images == [b"picture"]
    assert [m["role"] for m in second.messages] == ["user", "assistant", "user"]
    assert get_task("exact_match").judge("a  CAT.", first) == 1.0
    with pytest.raises(DataError, match="exact_match"):
        get_task("nothing")


def test_wilson_gives_the_published_intervals():
    low, high = wilson(0.5, 100)
    assert (round(low, 4), round(high, 4)) == (0.4038, 0.5962)
    low, high = wilson(1.0, 10)
    assert (round(low, 4), high) == (0.7225, 1.0)
    assert wilson(0.0, 0) == (0.0, 1.0)


def test_scores_are_given_for_all_and_for_each_type():
    questions = [Question(str(n), kind, [], "") for n, kind in enumerate(["a", "a", "b"])]
    table = summarize(questions, [1.0, 0.0, 1.0])
    assert {name: (round(score.mean, 3), score.n) for name, score in table.items()} == {
        "all": (0.667, 3),
        "a": (0.5, 2),
        "b": (1.0, 1),
    }
    assert str(table["b"]) == "1.000 [0.207, 1.000] n 1"

import textwrap
from pathlib import Path

import pytest

from ghostvis_data import DataError, Question, Sample, get_task, summarize
from ghostvis_data.tasks import TASKS, ask
from ghostvis_data.tasks.reasoning import pass_rates


def listed(*, images=(), **entry):
    return Sample("s", images=list(images), meta={"questions": [{"question": "What?", **entry}]})


def one(task, sample):
    (question,) = get_task(task).questions(sample)
    return question


def test_no_task_gives_a_point_for_an_empty_answer():
    samples = {
        "coco_captions": Sample("s", images=[b"p"], meta={"captions": [""]}),
        "humaneval": Sample(
            "s", meta={"humaneval": {"prompt": "", "canonical_solution": "", "test": "", "entry_point": ""}}
        ),
        "exact_match": Sample("s", [ask((), "x"), {"role": "assistant", "content": ""}]),
    }
    for name, task in TASKS.items():
        sample = samples.get(name) or listed(answer="", answers=["", ""], choices=["a", "b"])
        for question in task.questions(sample):
            assert task.judge_all(["", " \n"], [question] * 2) == [0.0, 0.0], name


def test_a_sample_without_questions_of_a_task_is_asked_nothing():
    sample = Sample("s", [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    for name, task in TASKS.items():
        assert len(task.questions(sample)) == (name == "exact_match"), name
        assert len(task.majority([sample])) == (name == "exact_match"), name


def test_ten_answers_give_the_official_share():
    question = one("vqav2", listed(answer="2", answers=["two", "2", *["3"] * 8], images=[b"p"]))
    assert question.messages[0]["content"][0] == {"type": "image", "image": b"p"}
    assert question.text == "What?\nAnswer the question using a single word or phrase."
    assert get_task("vqav2").judge("The 2.", question) == pytest.approx((2 / 3 * 8 + 1 / 3 * 2) / 10)
    assert get_task("vqav2").judge("three", question) == 1.0


def test_charts_are_scored_relaxed_and_years_apart():
    task, sample = get_task("chartqa"), listed(answer="2012", type="human")
    question = one("chartqa", sample)
    assert task.judge("2013.", question) == 1.0
    assert task.further_figures(["2013."], [question]) == {"accuracy with exact years": 0.0}


def test_documents_are_scored_by_the_best_of_their_answers():
    question = one("docvqa", listed(answer="ITC Limited", answers=["ITC Limited", "itc"]))
    assert get_task("docvqa").judge("ITC Limted", question) == pytest.approx(1 - 1 / 11)


@pytest.mark.parametrize(
    "reply, score",
    [
        ("B", 1),
        ("b.", 1),
        ("(B) because", 1),
        ("The answer is B .", 1),
        ("a", 0),
        ("It is the large green one here", 1),
        ("?", 0),
    ],
)
def test_a_letter_is_found_in_a_reply(reply, score):
    question = one("arc_easy", listed(answer="B", choices=["red", "green"]))
    assert question.text.splitlines()[1:3] == ["A. red", "B. green"]
    assert get_task("arc_easy").judge(reply, question) == score
    missing = get_task("arc_easy").further_figures([reply], [question])["replies without a choice"]
    assert missing == (reply == "?")


def test_mmmu_puts_pictures_where_the_text_names_them():
    entry = {"question": "Is <image 2> like <image 1>?", "choices": ["<image 3>", "no"], "answer": "A"}
    question = one("mmmu", Sample("s", images=[b"1", b"2", b"3", b"4"], meta={"questions": [entry]}))
    assert question.images == [b"4", b"2", b"1", b"3"]  # the one without a place comes first
    entry = {"question": "How long?", "answer": "1.06", "answers": ["1.06"]}
    question = one("mmmu", Sample("s", meta={"questions": [entry]}))
    assert get_task("mmmu").judge("So the length is 1.06 m", question) == 1.0
    assert get_task("mmmu").judge("So the length is 2 m", question) == 0.0


def test_a_worked_solution_is_scored_by_its_final_number():
    question = one("gsm8k", listed(answer="2 + 998 = 1,000\n#### 1,000"))
    assert [get_task("gsm8k").judge(reply, question) for reply in ("so #### 1000", "#### 1,000.", "1000")] == [1, 0, 0]


def test_a_program_is_run_with_its_tests_where_that_is_allowed(monkeypatch):
    facts = {
        "prompt": "def twice(x):\n",
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(f):\n    assert f(3) == 6",
        "entry_point": "twice",
    }
    task = get_task("humaneval")
    question = one("humaneval", Sample("s", meta={"humaneval": facts}))
    with pytest.raises(DataError, match="not been allowed"):
        task.judge("    return 2 * x", question)
    monkeypatch.setenv("GHOSTVIS_ALLOW_CODE_EXECUTION", "no-sandbox")
    replies = [
        "    return 2 * x",
        "Here:\n```python\ndef twice(x):\n    return x + x\n```",
        "```\nimport math\ndef twice(y):\n    return y * 2\n```",
        "    return x",
    ]
    scores = task.judge_all(replies, [question] * 4)
    assert scores == [1, 1, 1, 0]
    assert pass_rates([question] * 4, scores, (1, 2, 5)) == {"pass@1": 0.75, "pass@2": 1.0}


def test_captions_are_scored_as_a_set():
    task = get_task("coco_captions")
    questions = [
        one("coco_captions", Sample(str(n), images=[b"p"], meta={"captions": captions}))
        for n, captions in enumerate([["a red cat on a mat", "a cat on a mat"], ["two dogs run", "dogs run fast"]])
    ]
    with pytest.raises(DataError, match="judge_all"):
        task.judge("a cat", questions[0])
    scores = task.judge_all(["A red cat on a mat.", ""], questions)
    assert scores[0] > 3
    assert scores[1] == 0.0
    assert task.further_figures(["A red cat on a mat.", ""], questions)["CIDEr"] == pytest.approx(sum(scores) / 2)
    assert summarize(questions, scores)["all"].high > 1


def test_the_task_of_the_readme_is_one_file_of_about_twenty_lines(tmp_path):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    lines = readme.split("`yes_no.py`:\n\n")[1].split("\n\n## ")[0].splitlines()
    assert len(lines) <= 25
    (tmp_path / "yes_no.py").write_text(textwrap.dedent("\n".join(lines)))
    task = get_task(tmp_path / "yes_no.py")
    (question,) = task.questions(listed(answer="yes", images=[b"p"]))
    assert isinstance(question, Question)
    assert [task.judge(reply, question) for reply in ("Yes, it is.", "no", "")] == [1.0, 0.0, 0.0]


def test_a_file_without_a_task_is_refused(tmp_path):
    (tmp_path / "empty.py").write_text("task = 1\n")
    with pytest.raises(DataError, match=r"empty\.py sets no task[\s\S]*TASK"):
        get_task(tmp_path / "empty.py")
    with pytest.raises(DataError, match="no task file"):
        get_task(tmp_path / "nothing.py")
    with pytest.raises(DataError, match=r"vqav3[\s\S]*vqav2[\s\S]*Python file"):
        get_task("vqav3")

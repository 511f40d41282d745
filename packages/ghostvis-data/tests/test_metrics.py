"""Every official figure of the reference files, to the digits given there; they lie beside the repository."""

import gzip
import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghostvis_data import DataError
from ghostvis_data.metrics import code, documents, multiple_choice, vqa
from ghostvis_data.metrics.captions import caption_scores
from ghostvis_data.metrics.core import centred, core
from ghostvis_data.metrics.numbers import final_number
from ghostvis_data.metrics.ptb import ptb_tokens

REFERENCE = Path(__file__).parents[3].parent / "shared" / "reference"
needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason=f"the official figures are not here ({REFERENCE}); the project holds no copy of them"
)


def load(name):
    with gzip.open(REFERENCE / name, "rt") as file:
        return [json.loads(line) for line in file] if "jsonl" in name else json.load(file)


@pytest.fixture(scope="module")
def expected():
    return json.loads((REFERENCE / "expected.json").read_text())


@needs_reference
def test_vqav2_and_textvqa_accuracy_are_the_official_ones(expected):
    cases = load("vqa_golden.json.gz")["cases"]
    assert len(cases) == expected["vqa_golden"]["n"]
    ours = [100 * vqa.vqa_accuracy(case["pred"], case["answers"]) for case in cases]
    assert ours == pytest.approx([case["vqa_acc"] for case in cases], abs=1e-6)
    assert sum(ours) / len(ours) == pytest.approx(expected["vqa_golden"]["vqa_overall"], abs=1e-6)
    ours = [vqa.textvqa_accuracy(case["pred"], case["answers"]) for case in cases]
    assert ours == pytest.approx([case["textvqa_acc"] for case in cases], abs=1e-6)
    assert 100 * sum(ours) / len(ours) == pytest.approx(expected["vqa_golden"]["textvqa_overall"], abs=1e-6)
    for case in cases:
        assert vqa.textvqa_normalise(case["pred"]) == case["textvqa_norm"]
        if len(set(case["answers"])) > 1:
            assert vqa.vqa_normalise(case["pred"]) == case["vqa_norm"]


@needs_reference
def test_relaxed_accuracy_and_anls_are_the_official_ones(expected):
    golden, figures = load("chartqa_anls_golden.json.gz"), expected["chartqa_anls"]
    ours = [documents.relaxed_accuracy(case["pred"], case["target"]) for case in golden["chartqa"]]
    assert ours == [case["relaxed"] for case in golden["chartqa"]]
    assert sum(ours) / len(ours) == pytest.approx(figures["chartqa_accuracy"], abs=1e-6)
    ours = [documents.anls(case["pred"], case["targets"]) for case in golden["anls"]]
    assert ours == pytest.approx([case["anls_pix2struct"] for case in golden["anls"]], abs=1e-6)
    assert sum(ours) / len(ours) == pytest.approx(figures["anls_mean"], abs=1e-6)
    ours = [documents.anls_stvqa(case["pred"], case["targets"]) for case in golden["anls"]]
    assert ours == pytest.approx([case["anls_stvqa_m4c"] for case in golden["anls"]], abs=1e-6)
    unit, pairs = figures["pix2struct_unit_test"], figures["pix2struct_unit_test"]["pairs"]
    assert 12.5 * sum(documents.relaxed_accuracy(p, t) for t, p in pairs) == pytest.approx(unit["relaxed_accuracy"])
    assert 12.5 * sum(documents.anls(p, [t]) for t, p in pairs) == pytest.approx(unit["anls"], abs=1e-6)
    cider = caption_scores([ptb_tokens(p) for _, p in pairs], [[ptb_tokens(t)] for t, _ in pairs]).cider
    assert round(100 * cider, 1) == unit["cider"]


@needs_reference
def test_captions_become_the_tokens_of_the_official_tokeniser():
    pairs = []
    for image in load("coco_karpathy_captions.json.gz")["images"]:
        pairs += zip(image["refs"], image["ptb_refs"], strict=True)
        pairs += [(image["preds"][name], tokens) for name, tokens in image["ptb_preds"].items()]
    assert len(pairs) == 49_974
    assert [text for text, tokens in pairs if " ".join(ptb_tokens(text)) != tokens] == []


@needs_reference
def test_bleu_rouge_and_cider_are_the_official_ones(expected):
    images = load("coco_karpathy_captions.json.gz")["images"]
    for name, figures in expected["captions"].items():
        scored = [image for image in images if name in image["ptb_preds"]]
        assert len(scored) == figures["n"]
        scores = caption_scores(
            [image["ptb_preds"][name].split() for image in scored],
            [[reference.split() for reference in image["ptb_refs"]] for image in scored],
        )
        for key, value in scores.table().items():
            assert value == pytest.approx(figures[key], abs=1e-6), (name, key)
        if name in scored[0]["scores"]:
            each = [image["scores"][name] for image in scored]
            assert scores.cider_each.tolist() == pytest.approx([one["CIDEr"] for one in each], abs=1e-6)
            assert scores.rouge_l_each.tolist() == pytest.approx([one["ROUGE_L"] for one in each], abs=1e-6)
    tiny = expected["nlg_eval_tiny"]
    references = [[first.split(), second.split()] for first, second in zip(tiny["ref1"], tiny["ref2"], strict=True)]
    for key, value in caption_scores([text.split() for text in tiny["hyp"]], references).table().items():
        assert value == pytest.approx(tiny["expected"][key], abs=1e-6)


@needs_reference
@pytest.mark.parametrize("name", ["mmmu_val_llava1.5_13b", "mmmu_val_qwen_vl"])
def test_mmmu_replies_are_parsed_as_officially(expected, name):
    truth, guess, none = load("mmmu_answer_dict_val.json.gz"), random.Random(42), 0
    subjects = {}
    for case in load(f"{name}.json.gz"):
        answer = truth[case["id"]]["ground_truth"]
        if case["question_type"] == "multiple-choice":
            found = multiple_choice.choice_of(case["response"], case["index2ans"])
            assert found == case["official_parsed"]
            none += found is None
            right = (found or guess.choice(case["all_choices"])) == answer  # the official code guesses, seed 42
        else:
            candidates = multiple_choice.parse_open(case["response"])
            assert sorted(map(str, candidates)) == sorted(map(str, case["official_parsed"]))
            right = multiple_choice.open_correct(candidates, answer)
        subjects.setdefault(case["subject"], []).append(right)
    figures = expected[name]
    assert none == figures["fallback_random"]
    assert {subject: sum(right) / 30 for subject, right in subjects.items()} == pytest.approx(figures["per_subject"])
    assert round(sum(map(sum, subjects.values())) / 900, 3) == figures["overall"]


@needs_reference
@pytest.mark.parametrize("name", ["mmmu_pro_gpt4o_vision_direct", "mmmu_pro_gpt4o_vision_cot"])
def test_mmmu_pro_replies_are_parsed_as_officially(expected, name):
    right = none = 0
    for case in load(f"{name}.json.gz"):
        options = multiple_choice.read_options(case["options"])
        letters = multiple_choice.letters(len(options))
        found = multiple_choice.choice_of_pro(case["response"], dict(zip(letters, options, strict=True)))
        assert found == case["official_parsed"]
        right, none = right + (found == case["answer"]), none + (found is None)
    assert (right, none) == (expected[name]["correct_without_fallback"], expected[name]["fallback_random"])


@needs_reference
def test_gsm8k_numbers_give_every_official_verdict(expected):
    problems = load("gsm8k_example_model_solutions.jsonl.gz")

    def last(solution):  # these files mark the answer by the last "A: ", the data set by "#### "
        return final_number(solution[solution.rfind("A: ") :], "A: ")

    for model, figure in expected["gsm8k"].items():
        if model in problems[0]:
            right = []
            for problem in problems:
                right.append(last(problem[model]["solution"]) == last(problem["ground_truth"]))
                assert right[-1] == problem[model]["is_correct"]
            assert sum(right) / len(right) == pytest.approx(figure, abs=1e-6)


@needs_reference
def test_core_is_the_published_one(expected):
    results = load("dclm_core_results.json.gz")["results"]
    for name, figure in expected["core"].items():
        assert core(results[name]["icl"]) == pytest.approx(figure, abs=1e-6)
        assert core({task: 1.0 for task in results[name]["icl"] if task != "boolq"}) is None
    assert (centred(0.25, 25.0), centred(1.0, 62.0)) == (0.0, 1.0)


def humaneval(samples, expected):
    problems = {problem["task_id"]: problem for problem in load("HumanEval.jsonl.gz")}

    def run(sample):
        problem = problems[sample["task_id"]]
        return code.passes(
            code.humaneval_program(problem["prompt"], sample["completion"], problem["test"], problem["entry_point"])
        )

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, samples))
    by_problem = {}
    for sample, result in zip(samples, results, strict=True):
        by_problem.setdefault(sample["task_id"], []).append(result)
    return [
        sum(code.pass_at_k(len(group), sum(group), k) for group in by_problem.values()) / len(by_problem)
        for k in (1, 2, 5)
    ], sum(results)


@needs_reference
@pytest.mark.slow
def test_humaneval_pass_at_k_is_the_official_one(expected, monkeypatch):
    monkeypatch.setenv(code.VARIABLE, "sandbox" if shutil.which("bwrap") else "no-sandbox")
    rates, passed = humaneval(load("humaneval_mix_samples.jsonl.gz"), expected)
    mix = expected["humaneval"]["mix"]
    assert (rates, passed) == (pytest.approx([mix["pass@1"], mix["pass@2"], mix["pass@5"]], abs=1e-6), mix["passed"])


@needs_reference
def test_ten_humaneval_problems_pass_as_officially(expected, monkeypatch):
    monkeypatch.setenv(code.VARIABLE, "no-sandbox")  # canonical solutions and `return None`: nothing to be afraid of
    rates, _ = humaneval(load("humaneval_mix_samples.jsonl.gz")[:50], expected)
    assert rates == pytest.approx([0.4, 0.7, 1.0], abs=1e-6)


def test_no_program_runs_unless_it_is_allowed(monkeypatch):
    monkeypatch.delenv(code.VARIABLE, raising=False)
    with pytest.raises(DataError, match=r"not been allowed[\s\S]*GHOSTVIS_ALLOW_CODE_EXECUTION=sandbox"):
        code.passes("1")
    monkeypatch.setenv(code.VARIABLE, "sandbox")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError, match=r"bwrap is not installed[\s\S]*apt install bubblewrap"):
        code.passes("1")


HOSTILE = {
    "leaves early": "exit()",
    "leaves at once": "import os; os._exit(0)",
    "fails": "assert False",
    "takes all memory": "x = [0] * 10**10",
    "fills the disk": "open('big', 'wb').write(b'0' * (1 << 26))",
    "never ends": "while True: pass",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_does_not_pass(monkeypatch, name):
    monkeypatch.setenv(code.VARIABLE, "no-sandbox")
    monkeypatch.setattr(code, "_GRACE_S", 0.5)
    assert code.passes("print('x' * 100)")
    assert not code.passes(HOSTILE[name], timeout_s=0.5)


@pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed")
@pytest.mark.parametrize(
    "program",
    [
        "import socket; socket.create_connection(('1.1.1.1', 80), 1)",
        "open('/etc/passwd')",
        "open('/usr/mine', 'w')",
        f"import os; os.listdir({str(Path.home())!r})[0]; open({str(Path(__file__))!r})",
    ],
)
def test_the_sandbox_has_no_network_and_no_files(monkeypatch, program):
    monkeypatch.setenv(code.VARIABLE, "sandbox")
    assert code.passes("print(1)")
    assert not code.passes(program)


def test_pass_at_k_by_hand():
    assert (code.pass_at_k(5, 0, 1), code.pass_at_k(5, 5, 3), code.pass_at_k(4, 2, 2)) == (
        0.0,
        1.0,
        pytest.approx(5 / 6),
    )
    with pytest.raises(ValueError, match="pass@6 of 5"):
        code.pass_at_k(5, 1, 6)


@given(st.text("abc", max_size=70), st.text("abc", max_size=70))
def test_levenshtein_is_the_table_of_the_textbook(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, above = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    assert documents.levenshtein(a, b) == row[-1]


def test_empty_captions_score_nothing_and_bad_input_is_refused():
    scores = caption_scores([[], ["a", "b"]], [[["a"]], [["c", "d"], ["e"]]])
    assert scores.cider == scores.rouge_l == 0.0
    assert max(scores.bleu) < 1e-3
    for candidates, references in (([], []), ([["a"]], []), ([["a"]], [[]])):
        with pytest.raises(ValueError, match="captions"):
            caption_scores(candidates, references)


def test_a_year_has_to_be_met_exactly_in_the_stricter_reading():
    assert documents.relaxed_accuracy("2013", "2012")
    assert not documents.exact_year_accuracy("2013", "2012")
    assert documents.exact_year_accuracy("96", "100")

"""Worked solutions and programs: GSM8K and HumanEval."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ghostvis_data.metrics.code import humaneval_program, pass_at_k, passes
from ghostvis_data.metrics.numbers import final_number
from ghostvis_data.shards import Sample
from ghostvis_data.tasks.base import Question, Task, ask, listed_questions

STEPS = "Work it out step by step, then write the final number after ####."
PROGRAM = "Complete this Python function. Answer with the code alone."
_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)


def gsm8k_questions(sample: Sample) -> list[Question]:
    """The listed problem, with the request for the number behind ####."""
    return listed_questions(sample, STEPS)


def _final(reply: str, question: Question) -> str:
    return final_number(reply) or ""


def _same_number(answer: str, question: Question) -> float:
    return float(answer == final_number(question.answer))


def _functions(sample: Sample) -> list[Question]:
    facts = sample.meta.get("humaneval")
    if facts is None:
        return []
    messages = [ask((), f"{PROGRAM}\n\n{facts['prompt']}")]
    return [Question(sample.id, "all", messages, facts["canonical_solution"], facts=facts)]


def _completion(reply: str, question: Question) -> str:
    """The code of a reply: its last fenced block, else all of it; without the part that repeats the prompt.

    A reply that defines the function again replaces the prompt: `passes` sees both, and the later definition holds.
    """
    blocks = _BLOCK.findall(reply)
    code = blocks[-1] if blocks else reply.strip("\n")
    return code.removeprefix(question.facts["prompt"].lstrip("\n")).removeprefix(question.facts["prompt"])


def _passes(answer: str, question: Question) -> float:
    facts = question.facts
    prompt = facts["prompt"]
    if re.search(rf"^def {re.escape(facts['entry_point'])}\b", answer, re.MULTILINE):
        prompt = f"{prompt}    pass\n\n"
    return float(passes(humaneval_program(prompt, answer, facts["test"], facts["entry_point"])))


def pass_rates(questions: Sequence[Question], scores: Sequence[float], ks: Sequence[int] = (1, 10)) -> dict[str, float]:
    """pass@k of several replies to each question (the same question once per reply), for each k there are enough of.

    Args:
        questions: one per reply.
        scores: of `Task.judge`, as many.
        ks: values of k.
    """
    groups: dict[str, list[float]] = {}
    for question, score in zip(questions, scores, strict=True):
        groups.setdefault(question.sample_id, []).append(score)
    fewest = min((len(group) for group in groups.values()), default=0)
    return {
        f"pass@{k}": sum(pass_at_k(len(group), int(sum(group)), k) for group in groups.values()) / len(groups)
        for k in ks
        if k <= fewest
    }


GSM8K = Task("gsm8k", gsm8k_questions, _final, _same_number, max_tokens=512)
HUMANEVAL = Task("humaneval", _functions, _completion, _passes, max_tokens=512)

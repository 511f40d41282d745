"""Every reader on small files in the published schema; what the files say is made up."""

import gzip
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ghostvis_data import DataError, Dataset, get_task
from ghostvis_data.build import BuildOptions, build_published
from ghostvis_data.check import check_dataset, check_folder
from ghostvis_data.cli import main
from ghostvis_data.readers import SETS, files
from ghostvis_data.readers.files import json_elements


def jpeg(number=0, size=(32, 24)):
    out = io.BytesIO()
    Image.new("RGB", size, (number % 251, 90, 7)).save(out, "JPEG")
    return out.getvalue()


def png(number=0):
    out = io.BytesIO()
    Image.new("RGB", (20, 10), (number % 251, 90, 7)).save(out, "PNG")
    return out.getvalue()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def table(path, rows, group=2):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is an extra: pip install ghostvis-data[parquet]")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)


def lines(path, rows, opened=open):
    path.parent.mkdir(parents=True, exist_ok=True)
    with opened(path, "wb") as file:
        file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))


def built(name, root, tmp_path, how=None, **options):
    report = build_published(name, tmp_path / "out", how or BuildOptions(), root=root, **options)
    return {split: Dataset(tmp_path / "out" / split) for split in report.samples}


def turns(sample):
    return [
        (message["role"], message["content"] if isinstance(message["content"], str) else message["content"][-1]["text"])
        for message in sample.messages
    ]


# ---- COCO captions


def coco(root, year="2014", broken=()):
    for split, numbers in (("train", (9, 25)), ("val", (42,))):
        prefix = f"COCO_{split}2014_" if year == "2014" else ""
        images = [{"id": n, "file_name": f"{prefix}{n:012d}.jpg", "height": 24, "width": 32} for n in numbers]
        notes = [
            {"image_id": n, "id": 10 * n + k, "caption": f"Caption {k}  of {n}.\n"} for k in range(5) for n in numbers
        ]
        put(root / "annotations" / f"captions_{split}{year}.json", {"info": {}, "images": images, "annotations": notes})
        for image in images:
            if image["id"] not in broken:
                put(root / f"{split}{year}" / image["file_name"], jpeg(image["id"]))


@pytest.mark.parametrize("year", ["2014", "2017"])
def test_coco_captions_keep_all_five_and_store_the_image_once(tmp_path, year):
    coco(tmp_path / "coco", year)
    data = built("coco_captions", tmp_path / "coco", tmp_path)
    assert {split: len(one) for split, one in data.items()} == {"train": 2, "val": 1}
    first = data["train"][0]
    assert (first.id, first.images, first.meta["image_id"]) == ("9", [jpeg(9)], 9)
    answers = [text for role, text in turns(first) if role == "assistant"]
    assert sorted(answers) == first.meta["captions"] == [f"Caption {k} of 9." for k in range(5)]
    assert answers[0] == "Caption 4 of 9."  # 9 modulo 5: not the same annotator for every image
    (question,) = get_task("coco_captions").questions(data["val"][0])
    assert (question.images, len(question.references)) == ([jpeg(42)], 5)


def test_karpathys_splits_put_restval_into_training(tmp_path):
    coco(tmp_path / "coco")
    entries = [
        {"filename": f"COCO_{folder}_{n:012d}.jpg", "cocoid": n, "split": split, "sentences": [{"raw": f"A {n}."}]}
        for folder, n, split in (("train2014", 9, "train"), ("train2014", 25, "restval"), ("val2014", 42, "test"))
    ]
    put(tmp_path / "coco" / "dataset_coco.json", {"images": entries, "dataset": "coco"})
    data = built("coco_captions", tmp_path / "coco", tmp_path)
    assert {split: [sample.id for sample in one] for split, one in data.items()} == {
        "train": ["9", "25"],
        "test": ["42"],
    }


@pytest.mark.parametrize("flat", [False, True])
def test_coco_parquet_with_five_captions_a_row_or_one(tmp_path, flat):
    rows = []
    for n in (9, 25):
        cell = {"image": {"bytes": jpeg(n), "path": None}, "cocoid": n}
        texts = [f"Caption {k} of {n}." for k in range(3)]
        rows += [cell | {"caption": text} for text in texts] if flat else [cell | {"sentences_raw": texts}]
    table(tmp_path / "in" / "test-00000-of-00001.parquet", rows, group=6)
    data = built("coco_captions", tmp_path / "in", tmp_path)["test"]
    assert [len(sample.meta["captions"]) for sample in data] == [3, 3]
    assert [sample.images for sample in data] == [[jpeg(9)], [jpeg(25)]]


# ---- questions about pictures


def vqa_answers(right, count=7):
    texts = [right] * count + ["other"] * (10 - count)
    return [{"answer": text, "answer_confidence": "yes", "answer_id": k + 1} for k, text in enumerate(texts)]


def vqav2(root, questions_per_image=3, images=(9, 25)):
    for split in ("train", "val"):
        asked, notes = [], []
        for image in images:
            put(root / f"{split}2014" / f"COCO_{split}2014_{image:012d}.jpg", jpeg(image))
            for k in range(questions_per_image):
                number = 1000 * image + k
                asked.append({"image_id": image, "question": f"What is {k}?", "question_id": number})
                notes.append(
                    {
                        "question_id": number,
                        "image_id": image,
                        "question_type": "what is",
                        "answer_type": "other",
                        "multiple_choice_answer": f"soup {k}",
                        "answers": vqa_answers(f"soup {k}"),
                    }
                )
        put(root / f"v2_OpenEnded_mscoco_{split}2014_questions.json", {"info": {}, "questions": asked})
        put(root / f"v2_mscoco_{split}2014_annotations.json", {"info": {"a": [1]}, "annotations": notes})
    put(root / "v2_OpenEnded_mscoco_test2015_questions.json", {"questions": []})


def test_vqav2_asks_all_questions_about_an_image_in_one_conversation(tmp_path):
    vqav2(tmp_path / "in")
    data = built("vqav2", tmp_path / "in", tmp_path)
    assert {split: len(one) for split, one in data.items()} == {"train": 2, "val": 2}
    sample = data["train"][0]
    assert turns(sample)[2:4] == [
        ("user", "What is 1?\nAnswer the question using a single word or phrase."),
        ("assistant", "soup 1"),
    ]
    assert (len(sample.messages), sample.images) == (6, [jpeg(9)])
    assert "answers" not in sample.meta["questions"][0]
    questions = get_task("vqav2").questions(data["val"][0])
    assert [get_task("vqav2").judge(reply, questions[1]) for reply in ("Soup 1.", "other")] == pytest.approx([1.0, 0.9])
    assert [message["role"] for message in questions[1].messages] == ["user"]


def test_many_questions_about_one_image_become_several_conversations(tmp_path):
    vqav2(tmp_path / "in", questions_per_image=45, images=(9,))
    data = built("vqav2", tmp_path / "in", tmp_path, splits=("train",))["train"]
    assert [(sample.id, len(sample.messages)) for sample in data] == [("9", 40), ("9.1", 40), ("9.2", 10)]


@pytest.mark.parametrize("listed", [False, True])
def test_vqav2_parquet_with_answers_as_structs_or_as_lists(tmp_path, listed):
    answers = vqa_answers("soup")
    if listed:
        answers = {key: [answer[key] for answer in answers] for key in answers[0]}
    rows = [
        {
            "question_id": n,
            "image_id": n // 2,
            "question": "What?",
            "answer_type": "other",
            "multiple_choice_answer": "soup",
            "answers": answers,
            "image": {"bytes": jpeg(n // 2), "path": None},
        }
        for n in range(6)
    ]
    table(tmp_path / "in" / "data" / "validation-00000-of-00001.parquet", rows, group=6)
    data = built("vqav2", tmp_path / "in", tmp_path)["val"]
    assert [(sample.id, len(sample.messages)) for sample in data] == [("0@1", 4), ("1@3", 4), ("2@5", 4)]
    assert get_task("vqav2").questions(data[0])[0].references == ("soup",) * 7 + ("other",) * 3


def textvqa_row(n, answers):
    return {"question": "Which word?", "question_id": n, "image_id": f"{n // 2:016x}", "answers": answers}


def test_textvqa_teaches_the_most_frequent_answer_that_is_one(tmp_path):
    answers = ["unanswerable"] * 6 + ["stop"] * 3 + ["go"]
    for split in ("train", "val", "test"):
        rows = [textvqa_row(n, answers if split != "test" else []) for n in range(4)]
        put(tmp_path / "in" / f"TextVQA_0.5.1_{split}.json", {"dataset_name": "textvqa", "data": rows})
    for n in range(2):
        put(tmp_path / "in" / "train_images" / f"{n:016x}.jpg", jpeg(n))
    data = built("textvqa", tmp_path / "in", tmp_path)
    assert {split: len(one) for split, one in data.items()} == {"train": 2, "val": 2}
    assert turns(data["train"][1])[1] == ("assistant", "stop")
    question = get_task("textvqa").questions(data["val"][0])[0]
    assert get_task("textvqa").judge("stop", question) == pytest.approx(0.9)


def test_textvqa_parquet(tmp_path):
    rows = [textvqa_row(n, ["stop"] * 10) | {"image": {"bytes": jpeg(n // 2), "path": None}} for n in range(4)]
    table(tmp_path / "in" / "train-00000-of-00001.parquet", rows, group=4)
    assert [len(sample.messages) for sample in built("textvqa", tmp_path / "in", tmp_path)["train"]] == [4, 4]


def test_chartqa_files_keep_charts_as_they_are_and_name_who_asked(tmp_path):
    for split in ("train", "test"):
        for kind, count in (("human", 2), ("augmented", 1)):
            rows = [{"imgname": "7.png", "query": f"How many {k}?", "label": "14"} for k in range(count)]
            put(tmp_path / "in" / split / f"{split}_{kind}.json", rows)
        put(tmp_path / "in" / split / "png" / "7.png", png(7))
    data = built("chartqa", tmp_path / "in", tmp_path)
    assert [(sample.id, len(sample.messages)) for sample in data["train"]] == [
        ("augmented/7.png", 2),
        ("human/7.png", 4),
    ]
    assert data["test"][1].images == [png(7)]
    questions = [question for sample in data["test"] for question in get_task("chartqa").questions(sample)]
    assert [question.type for question in questions] == ["augmented", "human", "human"]
    assert get_task("chartqa").judge("14.5", questions[0]) == 1.0


def test_chartqa_parquet_of_both_mirrors(tmp_path):
    rows = [
        {"image": {"bytes": png(n // 2), "path": None}, "query": "How?", "label": ["14"], "human_or_machine": n % 2}
        for n in range(4)
    ]
    table(tmp_path / "in" / "data" / "train-00000-of-00001.parquet", rows, group=4)
    rows = [{"type": "human_test", "question": "How?", "answer": "14", "image": {"bytes": png(9), "path": None}}]
    table(tmp_path / "in" / "data" / "test-00000-of-00001.parquet", rows)
    data = built("chartqa", tmp_path / "in", tmp_path)
    assert [[q["type"] for q in sample.meta["questions"]] for sample in data["train"]] == [["human", "augmented"]] * 2
    assert data["test"][0].meta["questions"] == [
        {"type": "human", "question": "How?", "answer": "14", "answers": ["14"]}
    ]


def docvqa_row(n):
    return {
        "questionId": n,
        "question": "Who?",
        "question_types": ["layout"],
        "docId": n // 2,
        "answers": ["ITC", "itc"],
    }


def test_docvqa_files_and_parquet(tmp_path):
    rows = [docvqa_row(n) | {"image": f"documents/page_{n // 2}.png"} for n in range(4)]
    put(tmp_path / "in" / "val_v1.0_withQT.json", {"dataset_name": "docvqa", "data": rows})
    for n in range(2):
        put(tmp_path / "in" / "documents" / f"page_{n}.png", png(n))
    data = built("docvqa", tmp_path / "in", tmp_path)["val"]
    question = get_task("docvqa").questions(data[1])[0]
    assert (question.type, question.references, question.images) == ("layout", ("ITC", "itc"), [png(1)])
    rows = [
        docvqa_row(n) | {"image": {"bytes": png(n // 2), "path": None}, "ucsf_document_page_no": "3"} for n in range(4)
    ]
    table(tmp_path / "more" / "validation-00000-of-00001.parquet", rows, group=4)
    data = built("docvqa", tmp_path / "more", tmp_path / "second")["val"]
    assert [(sample.id, len(sample.messages)) for sample in data] == [("0_3@1", 4), ("1_3@3", 4)]


# ---- conversations


def llava(root, rows=12, images=4):
    records = []
    for n in range(rows):
        record = {"id": f"{n % images:012d}"}
        text = f"What is in it ({n})?"
        if n % 3:
            record["image"] = f"coco/train2017/{n % images:012d}.jpg"
            text = f"<image>\n{text}" if n % 2 else f"{text}\n<image>"
        record["conversations"] = [
            {"from": "human", "value": text},
            {"from": "gpt", "value": f"Ünseen {n}."},
            {"from": "human", "value": "And?"},
            {"from": "gpt", "value": "No."},
        ]
        records.append(record)
    put(root / "llava_v1_5_mix665k.json", records)
    for n in range(images):
        put(root / "coco" / "train2017" / f"{n:012d}.jpg", jpeg(n))
    return records


def test_llava_rows_put_the_picture_where_the_text_names_it(tmp_path):
    llava(tmp_path / "in")
    data = built("llava_instruct", tmp_path / "in", tmp_path)["train"]
    assert [sample.id for sample in data][:2] == ["000000000000@1", "000000000001@2"]
    assert data[0].images == []
    first, last = data[1].messages[0]["content"], data[2].messages[0]["content"]
    assert [part["type"] for part in first] == ["image", "text"]
    assert [part["type"] for part in last] == ["text", "image"]
    assert (first[1]["text"], last[0]["text"]) == ("What is in it (1)?", "What is in it (2)?")
    assert data[1].images == [jpeg(1)]
    assert data[1].messages[1]["content"] == "Ünseen 1."


def test_llava_finds_coco_images_of_either_year(tmp_path):
    llava(tmp_path / "in")
    for path in sorted((tmp_path / "in" / "coco" / "train2017").iterdir()):
        (tmp_path / "in" / "train2014").mkdir(exist_ok=True)
        path.rename(tmp_path / "in" / "train2014" / f"COCO_train2014_{path.name}")
    assert len(built("llava_instruct", tmp_path / "in", tmp_path)["train"]) == 12


@pytest.mark.parametrize(
    "change, pattern",
    [
        (lambda row: row.pop("conversations"), "no conversations"),
        (lambda row: row["conversations"][0].update(value="What?"), "0 x <image> in the text and 1 image"),
        (lambda row: row["conversations"][0].update({"from": "bob"}), "a turn from 'bob'"),
        (lambda row: row["conversations"].pop(1), "both from the user"),
        (lambda row: row.update(image="gone.jpg"), r"gone\.jpg does not exist"),
    ],
)
def test_a_bad_row_is_named_and_can_be_left_out(tmp_path, change, pattern):
    records = llava(tmp_path / "in")
    change(records[4])
    put(tmp_path / "in" / "llava_v1_5_mix665k.json", records)
    with pytest.raises(
        DataError, match=rf"1 of 12 lines of llava_instruct[\s\S]*mix665k\.json, row 5, id 0+0@5: .*{pattern}"
    ):
        built("llava_instruct", tmp_path / "in", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    data = built("llava_instruct", tmp_path / "in", tmp_path, BuildOptions(skip_bad=True))["train"]
    assert len(data) == 11
    left_out = json.loads((tmp_path / "out" / "dataset.json").read_text())["left_out"]
    assert [(entry["line"], entry["file"]) for entry in left_out] == [(5, "llava_v1_5_mix665k.json")]


def chat_rows(count):
    return [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"Name tree {n}."},
                {"role": "assistant", "content": "Oak."},
            ],
            "source": "smol-magpie",
        }
        for n in range(count)
    ]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_smoltalk(tmp_path, kind):
    for split, count in (("train", 5), ("test", 2)):
        write = table if kind == "parquet" else lines
        write(tmp_path / "in" / "data" / f"{split}-00000-of-00001.{kind}", chat_rows(count))
    data = built("smoltalk", tmp_path / "in", tmp_path)
    assert {split: len(one) for split, one in data.items()} == {"train": 5, "test": 2}
    assert data["train"][4].messages == chat_rows(5)[4]["messages"]
    assert data["train"][4].meta == {"source": "smol-magpie"}


# ---- texts, reasoning, choices


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz"])
def test_fineweb_and_any_file_with_a_text_column(tmp_path, kind):
    rows = [{"text": f"Rivers carve {n}.", "id": f"<urn:uuid:{n}>", "url": f"http://e.org/{n}"} for n in range(8)]
    for number in range(2):
        path = tmp_path / "in" / "sample" / f"00{number}_00000.{kind}"
        part = rows[4 * number : 4 * number + 4]
        if kind == "parquet":
            table(path, part)
        else:
            lines(path, part, gzip.open if kind.endswith("gz") else open)
    data = built("fineweb", tmp_path / "in", tmp_path)["train"]
    assert (data.kind, list(data.texts())) == ("text", [row["text"] for row in rows])
    assert data[5].id == "<urn:uuid:5>"
    split = built("fineweb", tmp_path / "in", tmp_path / "again", BuildOptions(shard_bytes=1), val_fraction=0.3)
    assert sorted(text for one in split.values() for text in one.texts()) == [row["text"] for row in rows]
    assert len(split["val"]) >= 1


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_gsm8k(tmp_path, kind):
    rows = [{"question": "2 * 500?", "answer": "2 * 500 = <<2*500=1000>>1,000\n#### 1,000"}]
    (table if kind == "parquet" else lines)(tmp_path / "in" / "main" / f"test-00000.{kind}", rows)
    (sample,) = built("gsm8k", tmp_path / "in", tmp_path)["test"]
    assert turns(sample)[1] == ("assistant", "2 * 500 = 1,000\n#### 1,000")
    (question,) = get_task("gsm8k").questions(sample)
    assert question.messages == sample.messages[:1]
    assert get_task("gsm8k").judge("It is #### 1000", question) == 1.0


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_arc_with_letters_or_numbers_as_labels(tmp_path, kind):
    rows = []
    for n, labels in enumerate((["A", "B", "C"], ["1", "2", "3"])):
        row = {
            "id": f"Q{n}",
            "question": "Which?",
            "choices": {"text": ["x", "y", "z"], "label": labels},
            "answerKey": labels[1],
        }
        if kind == "jsonl":
            pairs = zip(row["choices"]["text"], labels, strict=True)
            row["question"] = {"stem": "Which?", "choices": [{"text": text, "label": label} for text, label in pairs]}
            del row["choices"]
        rows.append(row)
    if kind == "parquet":
        table(tmp_path / "in" / "ARC-Easy" / "test-00000.parquet", rows)
        table(tmp_path / "in" / "ARC-Challenge" / "test-00000.parquet", rows[:1])
    else:
        lines(tmp_path / "in" / "ARC-Easy-Test.jsonl", rows)
        lines(tmp_path / "in" / "ARC-Challenge-Test.jsonl", rows[:1])
    data = built("arc_easy", tmp_path / "in", tmp_path)["test"]
    assert len(data) == 2
    for sample in data:
        (question,) = get_task("arc_easy").questions(sample)
        assert (question.answer, question.messages) == ("B", sample.messages[:1])
    assert len(built("arc_challenge", tmp_path / "in", tmp_path / "b")["test"]) == 1


def test_mmlu_keeps_few_shot_examples_apart(tmp_path):
    row = {"question": "Which?", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 3}
    for split, count in (("dev", 1), ("validation", 2), ("test", 3), ("auxiliary_train", 4)):
        table(tmp_path / "in" / "all" / f"{split}-00000-of-00001.parquet", [row] * count)
    data = built("mmlu", tmp_path / "in", tmp_path)
    assert {split: len(one) for split, one in data.items()} == {"dev": 1, "val": 2, "test": 3, "train": 4}
    (question,) = get_task("mmlu").questions(data["test"][0])
    assert (question.type, question.answer) == ("anatomy", "D")


def test_ai2d_and_scienceqa(tmp_path):
    image = {"bytes": png(1), "path": None}
    table(
        tmp_path / "a" / "test-0.parquet",
        [{"question": "Which?", "options": ["x", "y"], "answer": "1", "image": image}],
    )
    (sample,) = built("ai2d", tmp_path / "a", tmp_path / "one")["test"]
    assert get_task("ai2d").judge("B", get_task("ai2d").questions(sample)[0]) == 1.0
    row = {
        "image": image,
        "question": "Which?",
        "choices": ["x", "y"],
        "answer": 0,
        "hint": "Look.",
        "subject": "physics",
    }
    table(tmp_path / "b" / "validation-0.parquet", [row, row | {"image": None, "hint": ""}])
    seen, read = built("scienceqa", tmp_path / "b", tmp_path / "two")["val"]
    assert (len(seen.images), len(read.images)) == (1, 0)
    assert turns(seen)[0][1].splitlines()[:3] == ["Look.", "Which?", "A. x"]


def test_mmmu_reads_options_and_pictures(tmp_path):
    row = {f"image_{n}": {"bytes": png(n), "path": None} if n < 3 else None for n in range(1, 8)}
    row |= {
        "id": "validation_Art_1",
        "question": "Is <image 2> like <image 1>?",
        "options": "['yes', 'no']",
        "answer": "B",
    }
    table(tmp_path / "in" / "Art" / "validation-0.parquet", [row | {"question_type": "multiple-choice"}])
    (sample,) = built("mmmu", tmp_path / "in", tmp_path)["val"]
    (question,) = get_task("mmmu").questions(sample)
    assert (question.type, question.images, question.answer) == ("Art", [png(2), png(1)], "B")


def test_humaneval_brings_its_tests(tmp_path):
    row = {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f"}
    row |= {"canonical_solution": "    return 1\n", "test": "def check(f):\n    assert f() == 1"}
    lines(tmp_path / "in" / "HumanEval.jsonl.gz", [row], gzip.open)
    (sample,) = built("humaneval", tmp_path / "in", tmp_path)["test"]
    assert get_task("humaneval").questions(sample)[0].facts == row


# ---- what all of them promise


MAKERS = {"coco_captions": coco, "vqav2": vqav2, "llava_instruct": lambda root: llava(root, rows=40)}


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_built_can_be_rendered_and_read_by_a_model(tmp_path, name, tokenizer):
    MAKERS[name](tmp_path / "in")
    data = built(name, tmp_path / "in", tmp_path)
    for split in data.values():
        findings = check_dataset(split, tokenizer, tokens_per_image=4)
        assert findings.problems == []
        assert findings.trained > 0
        assert len(findings.lengths) == len(split)


def test_photographs_that_training_and_validation_share_are_found(tmp_path):
    vqav2(tmp_path / "in")  # the same two photographs in both
    built("vqav2", tmp_path / "in", tmp_path)
    train, _ = check_folder(tmp_path / "out")
    assert [problem.split("#", 1)[1] for problem in train.problems] == [
        "9: image 0 is held out for evaluation, as val#9",
        "25: image 0 is held out for evaluation, as val#25",
    ]


def test_published_sets_come_out_the_same_by_one_process_or_four(tmp_path):
    name = "llava_instruct"
    MAKERS[name](tmp_path / "in")
    for processes in (1, 4):
        folder = tmp_path / f"by{processes}"
        build_published(name, folder, BuildOptions(shard_bytes=4000, processes=processes), root=tmp_path / "in")
    files = sorted(path.relative_to(tmp_path / "by1") for path in (tmp_path / "by1").rglob("*") if path.is_file())
    assert len([path for path in files if path.suffix == ".tar"]) > 1
    assert files == sorted(
        path.relative_to(tmp_path / "by4") for path in (tmp_path / "by4").rglob("*") if path.is_file()
    )
    assert [
        path for path in files if (tmp_path / "by1" / path).read_bytes() != (tmp_path / "by4" / path).read_bytes()
    ] == []


KILLED = """
import os, sys
from ghostvis_data.build import BuildOptions, build_published
die = lambda done, total: os._exit(9) if done == 30 else None
build_published("llava_instruct", sys.argv[2], BuildOptions(shard_bytes=9000), root=sys.argv[1], on_progress=die)
"""


def test_a_build_that_was_killed_goes_on_and_gives_the_same_bytes(tmp_path):
    llava(tmp_path / "in", rows=40)
    root, options = tmp_path / "in", BuildOptions(shard_bytes=9000)
    build_published("llava_instruct", tmp_path / "whole", options, root=root)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "in"), str(tmp_path / "out")]
    assert subprocess.run(command, check=False).returncode == 9
    assert {path.name for path in tmp_path.iterdir()} == {"in", "whole", ".out.building", ".out.lock"}
    seen = []
    build_published(
        "llava_instruct", tmp_path / "out", options, root=root, on_progress=lambda done, _: seen.append(done)
    )
    assert 10 < seen[0] <= 30
    assert {path.name for path in tmp_path.iterdir()} == {"in", "whole", "out"}
    for path in (path for path in (tmp_path / "whole").rglob("*") if path.is_file()):
        assert path.read_bytes() == (tmp_path / "out" / path.relative_to(tmp_path / "whole")).read_bytes()


@pytest.mark.parametrize("name", [name for name in SETS if name != "humaneval"])
def test_a_folder_without_the_files_says_what_is_expected(tmp_path, name):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("hello")
    with pytest.raises(
        DataError, match=rf"holds no files of {name}[\s\S]*notes\.txt[\s\S]*ghostvis-data build {name} OUT --root"
    ):
        built(name, tmp_path / "in", tmp_path)


def test_broken_and_cut_images_of_a_published_set_are_named(tmp_path):
    coco(tmp_path / "in", broken=(25,))
    put(tmp_path / "in" / "train2014" / "COCO_train2014_000000000009.jpg", jpeg(9)[:-300])
    with pytest.raises(DataError, match=r"row 2, id 25: the image COCO_train2014_000000000025\.jpg does not exist"):
        built("coco_captions", tmp_path / "in", tmp_path)
    put(tmp_path / "in" / "train2014" / "COCO_train2014_000000000025.jpg", b"<html>")
    with pytest.raises(DataError) as error:
        built("coco_captions", tmp_path / "in", tmp_path)
    assert "2 of 3 lines" in str(error.value)
    assert "000000000009.jpg cannot be read" in str(error.value)
    assert "000000000025.jpg cannot be read" in str(error.value)
    assert "ghostvis-data check coco_captions" in str(error.value)


def test_a_parquet_file_with_other_columns_lists_them(tmp_path):
    table(tmp_path / "in" / "train-0.parquet", [{"prompt": "x", "reply": "y"}])
    with pytest.raises(DataError, match=r"no column for messages[\s\S]*it has prompt, reply"):
        built("smoltalk", tmp_path / "in", tmp_path)
    put(tmp_path / "in" / "train-0.parquet", b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match=r"train-0\.parquet cannot be read[\s\S]*pointer of Git LFS"):
        built("smoltalk", tmp_path / "in", tmp_path)


def test_records_of_another_form_are_refused_with_their_place(tmp_path):
    lines(tmp_path / "a" / "train.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}, {"question": "2 + 2?"}])
    with pytest.raises(DataError, match=r"row 2 of .*train\.jsonl is not of the published form \(no 'answer'\)"):
        built("gsm8k", tmp_path / "a", tmp_path)
    vqav2(tmp_path / "b")
    put(tmp_path / "b" / "v2_mscoco_val2014_annotations.json", {"annotations": [{"question_id": 7}]})
    with pytest.raises(DataError, match=r"a record of vqav2 below .* \(no 7\)"):
        built("vqav2", tmp_path / "b", tmp_path)
    records = llava(tmp_path / "c")
    del records[3]["conversations"][1]["value"]
    put(tmp_path / "c" / "llava_v1_5_mix665k.json", records)
    with pytest.raises(DataError, match=r"row 4, id 0+3@4: a turn of another form"):
        built("llava_instruct", tmp_path / "c", tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_set_that_is_not_known_or_not_on_the_hub_is_refused(tmp_path, capsys):
    assert main(["build", "vqav3", str(tmp_path / "out"), "--root", str(tmp_path)]) == 1
    assert "vqav2" in capsys.readouterr().err
    assert main(["build", "llava_instruct", str(tmp_path / "out")]) == 1
    assert "--root" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.network
def test_a_set_comes_from_the_hub_and_its_revision_is_written_down(tmp_path):
    report = build_published("gsm8k", tmp_path / "out")
    assert report.samples == {"train": 7473, "test": 1319}
    source = json.loads((tmp_path / "out" / "dataset.json").read_text())["source"]
    assert source["hub"] == "openai/gsm8k"
    assert len(source["revision"]) == 40


def test_the_command_builds_a_published_set(tmp_path, capsys):
    llava(tmp_path / "in")
    arguments = ["llava_instruct", str(tmp_path / "out"), "--root", str(tmp_path / "in"), "--val-fraction", "0.2"]
    assert main(["build", *arguments, "--processes", "1"]) == 0
    assert "train" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert sum(manifest["splits"].values()) == 12
    assert manifest["splits"]["val"] >= 1
    assert "licence" in manifest["source"]


def test_json_lists_are_read_piece_by_piece_wherever_they_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_BYTES", 7)
    monkeypatch.setattr(files, "_REFILL", 3)
    rng = np.random.default_rng(0)
    words = ['ü"x\\', "", 1, -2.5, None, True, "日本" * 9, [], {}, [[1], {"a": {"b": "]}"}}]]
    for trial in range(60):
        values = [words[k] for k in rng.integers(0, len(words), rng.integers(0, 9))]
        for key in (None, "data"):
            whole = values if key is None else {"info": {"data": [1]}, "x": [3], key: values, "z": 1}
            raw = json.dumps(whole, ensure_ascii=bool(trial % 2), indent=trial % 3 or None).encode()
            (tmp_path / "f.json").write_bytes((b"\xef\xbb\xbf" if trial % 5 == 0 else b"") + raw)
            found = list(json_elements(tmp_path / "f.json", key))
            assert [element.value for element in found] == values
            whole = (tmp_path / "f.json").read_bytes()
            assert [json.loads(whole[e.offset : e.offset + e.size_bytes]) for e in found] == values


@pytest.mark.parametrize("content", ["", "[1, 2", '{"other": [1]}', "[1 2]", "nonsense", '{"data": {"a": 1}}'])
def test_json_of_another_form_is_refused_with_its_place(tmp_path, content):
    (tmp_path / "f.json").write_text(content)
    with pytest.raises(DataError, match=r"f\.json is not the JSON it should be, near byte \d+"):
        list(json_elements(tmp_path / "f.json", None if content.startswith("[") else "data"))

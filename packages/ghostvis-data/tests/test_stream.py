import json
import threading
from itertools import pairwise
from typing import Any

import pytest
import torch

from ghostvis_data import DataError, Dataset, Sample, Stream
from ghostvis_data.rendering import render_sample
from ghostvis_model.chat import RenderError
from ghostvis_model.images import ImageError, to_pixels

N, S, T, R = 4, 8, 96, 4
FIELDS = ("ids", "targets", "position_ids", "cu_seqlens", "images", "image_index")


def make(datasets, tokenizer, **options):
    options: dict[str, Any] = {"row_tokens": T, "rows_per_step": R, "seed": 5, "prefetch_steps": 0} | options
    return Stream(datasets, tokenizer, tokens_per_image=N, image_size=S, **options)


def equal(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in FIELDS) and a.sample_ids == b.sample_ids


def documents(batch):
    """(sample id, ids, targets, positions, images) of each document, cut out of a batch by cu_seqlens."""
    bounds = batch.cu_seqlens.tolist()
    flat = [getattr(batch, name).flatten() for name in ("ids", "targets", "position_ids")]
    starts, names = list(pairwise(bounds)), [list(row) for row in batch.sample_ids]
    for start, end in starts:
        row = names[start // T]
        inside = [k for k in range(len(batch.images)) if start <= batch.image_index[k * N] < end]
        yield row.pop(0) if row else None, *(one[start:end] for one in flat), batch.images[inside]


def test_a_packed_document_equals_its_sample_alone(mixed, tokenizer):
    chats, _ = mixed
    index = {chats.record(i).id: i for i in range(len(chats))}
    stream, seen = make([chats], tokenizer), []
    for step in range(stream.steps(1)):
        for batch in stream.micro_batches(step, rows_per_micro_batch=2):
            assert batch.cu_seqlens[0] == 0
            assert batch.cu_seqlens[-1] == batch.ids.numel()
            assert batch.max_seqlen == batch.cu_seqlens.diff().max()
            assert batch.num_targets == (batch.targets != -100).sum()
            assert (batch.ids.flatten()[batch.image_index] == tokenizer.image).all()
            assert (batch.ids == tokenizer.image).sum() == len(batch.image_index) == N * len(batch.images)
            for name, ids, targets, positions, images in documents(batch):
                assert positions.tolist() == list(range(len(ids)))
                if name is None:  # the padding at the end of a row
                    assert (targets == -100).all()
                    continue
                seen.append(name)
                alone = render_sample(chats, index[name], tokenizer, N)
                assert ids.tolist() == alone.ids
                wanted = [i if m else -100 for i, m in zip(alone.ids[1:], alone.mask[1:], strict=True)]
                assert targets.tolist() == [*wanted, -100]
                pixels = [torch.from_numpy(to_pixels(content, S)) for content in chats.images(index[name])]
                assert all(torch.equal(a, b) for a, b in zip(images, pixels, strict=True))
    first_epoch = seen[: len(chats)]
    assert len(seen) >= len(chats)
    assert set(first_epoch) | set(seen) == set(index)


def test_every_token_of_a_long_text_is_predicted_once(mixed, tokenizer):
    _, texts = mixed
    stream, trained = make([texts], tokenizer, rows_per_step=1), []
    rows = stream.plan.epoch(0).rows
    for step in range(rows):
        (batch,) = stream.micro_batches(step)
        trained += [token for token in batch.targets.flatten().tolist() if token != -100]
    wanted = [token for i in range(len(texts)) for token in tokenizer.encode(texts[i].text)]
    assert sorted(trained) == sorted(wanted)


def test_a_long_conversation_keeps_its_images_and_its_first_question(tmp_path, write, chat, png, tokenizer):
    long = chat("long", "q" * 20, "a" * 200, [png(1), png(2)])
    data = write(tmp_path / "d", [long])
    (batch,) = make([data], tokenizer, rows_per_step=1).micro_batches(0)
    assert len(batch.images) == 2
    assert (batch.ids == tokenizer.image).sum() == 2 * N
    assert batch.targets[0, T - 2] == ord("a")
    with pytest.raises(RenderError, match=r"d#long"):
        make([data], tokenizer, row_tokens=24)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(mixed, tokenizer, world):
    whole, shared = make(mixed, tokenizer), make(mixed, tokenizer)
    for step in range(3):
        rows = whole.micro_batches(step, rows_per_micro_batch=1)
        parts = [shared.micro_batches(step, rank, world, 1) for rank in range(world)]
        together = [part[m] for m in range(R // world) for part in parts]
        assert all(equal(a, b) for a, b in zip(rows, together, strict=True))


def test_two_ranks_agree_on_steps_when_rows_are_odd(tmp_path, write, chat, tokenizer):
    data = write(tmp_path / "d", [chat(f"{n}", "q" * 60) for n in range(7)])  # 7 rows, 2 a step
    streams = [make([data], tokenizer, rows_per_step=2) for _ in range(2)]
    assert [stream.plan.epoch(0).rows for stream in streams] == [7, 7]
    assert [stream.steps(1) for stream in streams] == [4, 4]
    taken = [
        name
        for step in range(4)
        for rank in range(2)
        for batch in streams[rank].micro_batches(step, rank, 2)
        for row in batch.sample_ids
        for name in row
    ]
    assert len(taken) == 8
    assert set(taken) == {str(n) for n in range(7)}


def test_any_step_can_be_the_first_after_a_restart(mixed, tokenizer):
    unbroken = make(mixed, tokenizer, prefetch_steps=2)
    steps = unbroken.steps(2)
    stream = [unbroken.micro_batches(step, rows_per_micro_batch=2) for step in range(steps)]
    unbroken.close()
    for first in range(0, steps, 3):
        with make(mixed, tokenizer, prefetch_steps=2) as resumed:
            for step in range(first, min(first + 2, steps)):
                again = resumed.micro_batches(step, rows_per_micro_batch=2)
                assert all(equal(a, b) for a, b in zip(stream[step], again, strict=True))


def test_rows_without_images_give_empty_image_tensors(mixed, tokenizer):
    _, texts = mixed
    (batch,) = make([texts], tokenizer).micro_batches(0)
    assert batch.images.shape == (0, 3, S, S)
    assert batch.images.dtype == torch.uint8
    assert batch.image_index.shape == (0,)
    assert "images" not in batch.to("cpu").inputs()


def test_loss_on_all_tokens_leaves_out_images_and_the_beginning(mixed, tokenizer):
    chats, _ = mixed
    stream = make([chats], tokenizer, loss_on="all")
    (batch,) = stream.micro_batches(0)
    special = {tokenizer.bos, tokenizer.image}
    used = [token for token in batch.targets.flatten().tolist() if token != -100]
    assert not special & set(used)
    tokens = sum(document.tokens for row in stream.plan.step_rows(0) for document in row)
    # Each document's first token is predicted by nothing.
    assert len(used) == tokens - sum(map(len, batch.sample_ids)) - len(batch.image_index)


def test_rows_that_do_not_divide_are_refused_with_a_batch_size_that_does(mixed, tokenizer):
    with pytest.raises(DataError, match=r"4 rows per step[\s\S]*--total-batch-size 576"):
        make(mixed, tokenizer).micro_batches(0, 0, 3)


def test_images_for_a_model_without_eyes_are_refused(mixed, tokenizer):
    with pytest.raises(DataError, match="takes none"):
        Stream(mixed, tokenizer, row_tokens=T, rows_per_step=R)


@pytest.mark.parametrize("mentioned, stored", [(0, 1), (1, 2), (2, 1)])
def test_placeholders_that_do_not_match_images_name_the_sample_and_both_numbers(
    tmp_path, write, chat, png, tokenizer, mentioned, stored
):
    messages = chat("wrong", images=[png(k) for k in range(mentioned)]).messages
    data = write(tmp_path / "d", [Sample("wrong", messages, images=[png(k) for k in range(stored)])])
    with pytest.raises(RenderError) as error:
        make([data], tokenizer)
    assert f"{mentioned * N} image placeholders but {stored * N} image features" in str(error.value)
    assert "#wrong" in str(error.value)


def test_an_error_in_the_prefetching_thread_reaches_the_caller_with_the_sample(tmp_path, write, chat, png, tokenizer):
    broken = chat("broken", images=[png(1)[:40]])
    data = write(tmp_path / "d", [broken])
    with make([data], tokenizer, prefetch_steps=2) as stream, pytest.raises(ImageError, match=r"d#broken"):
        stream.micro_batches(0)
    assert not any(thread.name.startswith("ghostvis-data") for thread in threading.enumerate())


def test_counted_lengths_are_kept_beside_the_data_and_follow_the_tokenizer(mixed, tokenizer):
    chats, _ = mixed
    make([chats], tokenizer)
    (kept,) = chats.folder.glob("lengths-*.npy")
    stamp = kept.stat().st_mtime_ns
    make([Dataset(chats.folder)], tokenizer)
    assert kept.stat().st_mtime_ns == stamp
    Stream([chats], tokenizer, tokens_per_image=N + 1, image_size=S, row_tokens=T, rows_per_step=R)
    assert len(list(chats.folder.glob("lengths-*.npy"))) == 2


def test_a_small_cache_changes_nothing_but_speed(mixed, tokenizer):
    with_cache, without = make(mixed, tokenizer), make(mixed, tokenizer, cache_bytes=0)
    for step in (0, 1, 0):
        assert all(map(equal, with_cache.micro_batches(step), without.micro_batches(step)))


def damage(data, index, member=0, keep=0):
    """Overwrite a member of a sample behind its first bytes."""
    offset, size = data._members[data._first[index] + member].tolist()
    path = data.folder / data._shard(index)["name"]
    content = bytearray(path.read_bytes())
    content[offset + keep : offset + size] = b"\0" * (size - keep)
    path.write_bytes(content)


def test_broken_samples_keep_their_places_are_counted_and_nothing_else_moves(mixed, tokenizer, caplog):
    chats, _ = mixed
    whole = make([chats], tokenizer)
    sound = [batch for step in range(whole.steps(1)) for batch in whole.micro_batches(step, rows_per_micro_batch=1)]
    with_images = [n for n in range(50) if chats.image_count(n)]
    truncated, garbage, moved = with_images[0], with_images[5], with_images[9]
    names = [chats.record(n).id for n in (truncated, garbage, moved)]
    damage(chats, truncated, member=1, keep=30)  # half a picture
    damage(chats, garbage)  # no JSON
    data = Dataset(chats.folder)
    data._members[data._first[moved]] += 512  # an index that lies
    stream = make([data], tokenizer, skip_budget=3)
    read = [batch for step in range(whole.steps(1)) for batch in stream.micro_batches(step, rows_per_micro_batch=1)]
    for before, after in zip(sound, read, strict=True):
        assert after.cu_seqlens.equal(before.cu_seqlens)
        for old, new in zip(documents(before), documents(after), strict=True):
            if old[0] in names:
                assert (new[2] == -100).all()
            else:
                assert all(torch.equal(x, y) for x, y in zip(old[1:], new[1:], strict=True))
    assert stream.stats().skipped == {"image": 1, "member": 1, "record": 1}
    assert sum("skipped" in record.message for record in caplog.records) == 3


def read_an_epoch(stream):
    return [stream.micro_batches(step) for step in range(stream.steps(1))]


def test_one_broken_sample_too_many_stops_the_run_and_says_which(mixed, tokenizer):
    chats, _ = mixed
    make([chats], tokenizer)  # lengths are counted before anything breaks
    for index in (3, 4, 5):
        damage(chats, index)
    stream = make([Dataset(chats.folder)], tokenizer, skip_budget=2)
    with pytest.raises(DataError, match=r"3 samples cannot be used: 3 record[\s\S]*at most 2"):
        read_an_epoch(stream)
    strict = make([Dataset(chats.folder)], tokenizer)
    with pytest.raises(DataError, match="is not the JSON of a sample"):
        read_an_epoch(strict)


def test_samples_found_broken_while_counting_are_left_out_of_the_plan(mixed, tokenizer):
    chats, _ = mixed
    damage(chats, 7)
    for _ in range(2):  # counted, then read from the kept lengths
        stream = make([Dataset(chats.folder)], tokenizer, skip_budget=1)
        assert stream.stats().skipped == {"record": 1}
        assert 7 not in stream.plan.epoch(0).documents[:, 1]
        assert len(stream.plan.epoch(0).documents) == 49
    with pytest.raises(DataError, match="is not the JSON"):
        make([Dataset(chats.folder)], tokenizer)


def test_stats_tell_the_share_of_time_spent_waiting(mixed, tokenizer):
    with make(mixed, tokenizer, prefetch_steps=1) as stream:
        for step in range(4):
            stream.micro_batches(step)
        stats = stream.stats()
    assert stats.first_batch_s > 0
    assert 0 <= stats.waited_s <= stats.seconds
    assert 0 <= stats.wait_share <= 1


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_eight_ranks_and_any_number_of_threads_share_one_small_shard(tmp_path, write, chat, png, tokenizer, threads):
    data = write(tmp_path / "d", [chat(f"{n}", images=[png(n)]) for n in range(5)])
    options = {"rows_per_step": 8, "threads": threads, "prefetch_steps": 2}
    parts = []
    for rank in range(8):
        with make([data], tokenizer, **options) as stream:
            parts += [stream.micro_batches(step, rank, 8)[0] for step in range(2)]
    whole = make([data], tokenizer, rows_per_step=8)
    for step in range(2):
        rows = whole.micro_batches(step, rows_per_micro_batch=1)
        assert all(equal(rows[rank], parts[2 * rank + step]) for rank in range(8))


@pytest.mark.parametrize("before, after", [(2, 1), (1, 3), (6, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(mixed, tokenizer, before, after):
    """State of less than 1 KB; the global batches after it are those of the unbroken run."""
    unbroken = make(mixed, tokenizer, rows_per_step=12)
    stream = make(mixed, tokenizer, rows_per_step=12)
    for rank in range(before):
        stream.micro_batches(0, rank, before, 2)
    state = json.loads(json.dumps(stream.state(1)))
    resumed = make(mixed, tokenizer, rows_per_step=12)
    step = resumed.restore(state)
    whole = unbroken.micro_batches(step, rows_per_micro_batch=2)
    parts = [resumed.micro_batches(step, rank, after, 2) for rank in range(after)]
    together = [part[m] for m in range(6 // after) for part in parts]
    assert all(equal(a, b) for a, b in zip(whole, together, strict=True))


@pytest.mark.gpu
def test_batches_that_were_copied_ahead_to_a_gpu_are_the_same(mixed, tokenizer):
    here = make(mixed, tokenizer)
    with make(mixed, tokenizer, device="cuda", prefetch_steps=2) as there:
        for step in range(here.steps(2)):
            for a, b in zip(here.micro_batches(step), there.micro_batches(step), strict=True):
                assert b.ids.is_cuda
                assert b.images.is_cuda
                assert b.images.is_contiguous()
                assert equal(a, b.to("cpu"))

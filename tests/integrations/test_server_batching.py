"""The reward server's queue, alone: each request gets its own rows once, and nothing is computed for those who left."""

import asyncio
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechreward.errors import RewardError
from mechreward.integrations.server.batching import Batcher
from mechreward.integrations.server.refusal import Refused
from mechreward.integrations.server.scorer import Rollout, Score
from mechreward.integrations.server.worker import WorkerDied


def request(number, lengths):
    """A request whose rollouts can be told from all others: ``number`` and the row are their prompts."""
    return [Rollout([number, row], [0] * length) for row, length in enumerate(lengths)]


def answer(rollouts):
    return [Score(float(1000 * r.prompt_ids[0] + r.prompt_ids[1]), "initial") for r in rollouts]


def own(number, scores, lengths):
    return [score.reward for score in scores] == [float(1000 * number + row) for row in range(len(lengths))]


class Scorer:
    """Computes a batch at a time, each after the next of ``permits``; rollouts of ``poison`` cannot be scored."""

    def __init__(self, poison=(), deadly=()):
        self.batches, self.poison, self.deadly, self.at_work = [], set(poison), set(deadly), 0
        self.permits = asyncio.Semaphore(0)

    def allow(self, batches=10**6):
        for _ in range(min(batches, 1000)):
            self.permits.release()

    async def __call__(self, rollouts):
        self.at_work += 1
        assert self.at_work == 1, "the worker is asked for one batch at a time"
        self.batches.append(list(rollouts))
        await self.permits.acquire()
        self.at_work -= 1
        numbers = {r.prompt_ids[0] for r in rollouts}
        if numbers & self.deadly:
            raise WorkerDied
        if numbers & self.poison:
            raise RewardError("it cannot be scored")
        return answer(rollouts)

    @property
    def computed(self):
        return Counter(r.prompt_ids[0] for batch in self.batches for r in batch)


async def turns(count=5):
    for _ in range(count):
        await asyncio.sleep(0)


def within_a_minute(play):
    """What hangs is wrong, and should say so."""
    asyncio.run(asyncio.wait_for(play(), 60))


LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(LENGTHS, st.integers(0, 3), st.sampled_from(["stay", "stay", "stay", "leave", "poison"])), max_size=12
    ),
    st.integers(1, 120),
    st.integers(0, 10**6),
)
def test_every_request_gets_exactly_its_own_rows_whatever_arrives_when(arriving, budget, seed):
    async def play():
        poison = {n for n, (_, _, fate) in enumerate(arriving) if fate == "poison"}
        scorer = Scorer(poison)
        batcher = Batcher(scorer, budget, queue_tokens=10**9)
        asked, left_early = {}, set()
        for number, (lengths, pause, fate) in enumerate(arriving):
            asked[number] = asyncio.create_task(batcher.submit(request(number, lengths)))
            await turns(pause)
            if (seed >> number) % 3 == 0:
                scorer.allow(1)
            if fate == "leave" and not asked[number].done():
                if number not in scorer.computed:
                    left_early.add(number)
                asked[number].cancel()
        scorer.allow()
        answers = await asyncio.gather(*asked.values(), return_exceptions=True)
        for number, (found, (lengths, _, fate)) in enumerate(zip(answers, arriving, strict=True)):
            if fate == "poison":
                assert isinstance(found, RewardError)
            elif isinstance(found, asyncio.CancelledError):
                assert fate == "leave"
            else:
                assert own(number, found, lengths)
        assert not left_early & scorer.computed.keys(), "a request that had left the queue was computed"
        for batch in scorer.batches:
            numbers = [r.prompt_ids[0] for r in batch]
            assert numbers == sorted(numbers), "first come, first served"
            assert sum(map(len, batch)) <= budget or len(set(numbers)) == 1
            for number in set(numbers):  # never split, so that groups stay whole
                assert numbers.count(number) == len(arriving[number][0])
        first_times = list(dict.fromkeys(r.prompt_ids[0] for batch in scorer.batches for r in batch))
        assert first_times == sorted(first_times)
        if not poison:
            assert max(scorer.computed.values(), default=0) <= 4  # rows of one request: none is computed twice
            assert all(scorer.computed[n] == len(arriving[n][0]) for n in scorer.computed)
        assert batcher.waiting_tokens == 0
        await asyncio.wait_for(batcher.drain(), 5)

    within_a_minute(play)


@settings(max_examples=60, deadline=None)
@given(st.lists(LENGTHS, min_size=1, max_size=15), st.integers(1, 200))
def test_the_queue_holds_its_tokens_and_no_more(sizes, room):
    async def play():
        scorer = Scorer()
        batcher = Batcher(scorer, batch_tokens=1, queue_tokens=room)
        busy = asyncio.create_task(batcher.submit(request(999, [1])))
        await turns()
        waiting, taken = 0, []
        for number, lengths in enumerate(sizes):
            tokens = sum(map(len, request(number, lengths)))
            task = asyncio.create_task(batcher.submit(request(number, lengths)))
            await turns(2)
            if waiting and waiting + tokens > room:
                assert task.done()
                with pytest.raises(Refused, match="The queue is full"):
                    await task
            else:  # one that is larger than the whole queue is taken where nothing waits, or it never could be
                waiting += tokens
                taken.append((number, lengths, task))
            assert batcher.waiting_tokens == waiting
        scorer.allow()
        await busy
        for number, lengths, task in taken:
            assert own(number, await task, lengths)

    within_a_minute(play)


def test_a_full_queue_says_how_long_it_takes_to_be_computed():
    async def play():
        scorer = Scorer()
        batcher = Batcher(scorer, batch_tokens=100, queue_tokens=1000)
        scorer.allow(1)
        await batcher.submit(request(0, [98]))
        batcher._speed = 20.0  # tokens a second, in place of the fake scorer's thousands
        waiting = [asyncio.create_task(batcher.submit(request(1, [98])))]
        await turns()  # it is at work
        waiting += [asyncio.create_task(batcher.submit(request(n, [98]))) for n in range(2, 12)]
        await turns()
        with pytest.raises(Refused) as full:
            await batcher.submit(request(12, [98]))
        assert full.value.headers["Retry-After"] == "50"  # 1000 tokens; the batch at work does not wait any more
        scorer.allow()
        await asyncio.gather(*waiting)

    within_a_minute(play)


def test_a_cancelled_request_makes_room_at_once_and_is_not_computed():
    async def play():
        scorer = Scorer()
        batcher = Batcher(scorer, batch_tokens=10, queue_tokens=20)
        asked = [asyncio.create_task(batcher.submit(request(0, [8])))]
        await turns()  # it is at work
        asked += [asyncio.create_task(batcher.submit(request(n, [8]))) for n in (1, 2)]
        await turns()
        assert batcher.waiting_tokens == 20
        with pytest.raises(Refused, match="The queue is full"):
            await batcher.submit(request(3, [8]))
        asked[1].cancel()
        await turns()
        assert batcher.waiting_tokens == 10 and len(batcher._waiting) == 1  # nothing of it is kept
        last = asyncio.create_task(batcher.submit(request(4, [8])))
        scorer.allow()
        assert own(2, await asked[2], [8]) and own(4, await last, [8]) and own(0, await asked[0], [8])
        assert set(scorer.computed) == {0, 2, 4}

    within_a_minute(play)


def test_a_request_that_leaves_in_the_middle_of_its_batch_takes_nothing_from_the_others():
    async def play():
        scorer = Scorer()
        batcher = Batcher(scorer, batch_tokens=1000, queue_tokens=1000)
        asked = [asyncio.create_task(batcher.submit(request(n, [1, 2]))) for n in range(5)]
        await turns()
        await turns()
        assert [r.prompt_ids[0] for r in scorer.batches[0]] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        asked[2].cancel()
        scorer.allow()
        for number in (0, 1, 3, 4):
            assert own(number, await asked[number], [1, 2])
        assert asked[2].cancelled() and len(scorer.batches) == 1

    within_a_minute(play)


def test_one_poisoned_request_does_not_fail_those_in_its_batch():
    async def play():
        scorer = Scorer(poison={2})
        batcher = Batcher(scorer, batch_tokens=1000, queue_tokens=1000)
        asked = [asyncio.create_task(batcher.submit(request(n, [3]))) for n in range(5)]
        await turns()
        scorer.allow()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(answers[2], RewardError)
        assert all(own(n, answers[n], [3]) for n in (0, 1, 3, 4))
        assert own(9, await batcher.submit(request(9, [3])), [3])

    within_a_minute(play)


def test_a_worker_that_dies_fails_its_batch_and_no_other():
    async def play():
        scorer = Scorer(deadly={1})
        batcher = Batcher(scorer, batch_tokens=10, queue_tokens=1000)
        asked = [asyncio.create_task(batcher.submit(request(n, [3]))) for n in range(5)]
        await turns()
        scorer.allow()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [isinstance(found, WorkerDied) for found in answers] == [True, True, False, False, False]
        assert all(own(n, answers[n], [3]) for n in (2, 3, 4))

    within_a_minute(play)


def test_a_drain_answers_all_that_was_taken_and_takes_no_more():
    async def play():
        scorer = Scorer()
        batcher = Batcher(scorer, batch_tokens=10, queue_tokens=1000)
        asked = [asyncio.create_task(batcher.submit(request(n, [5]))) for n in range(6)]
        await turns()
        draining = asyncio.create_task(batcher.drain())
        await turns()
        with pytest.raises(Refused, match="is stopping"):
            await batcher.submit(request(7, [5]))
        assert not draining.done()
        scorer.allow()
        answers = await asyncio.gather(*asked)
        assert all(own(n, found, [5]) for n, found in enumerate(answers))
        await asyncio.wait_for(draining, 5)

    within_a_minute(play)


def test_a_drain_does_not_wait_for_what_nobody_waits_for():
    async def play():
        scorer = Scorer()  # never allowed: a worker that hangs
        batcher = Batcher(scorer, batch_tokens=10, queue_tokens=1000)
        asked = [asyncio.create_task(batcher.submit(request(n, [5]))) for n in range(3)]
        await turns()
        for task in asked:
            task.cancel()
        await asyncio.wait_for(batcher.drain(), 5)
        assert all(task.cancelled() for task in asked)

    within_a_minute(play)

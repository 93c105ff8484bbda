"""What ends a block of a task, and what does not."""

from __future__ import annotations

import asyncio

import pytest

from qpert.runtime.serving.interruption import Interruption


def test_an_interrupted_block_ends_and_its_task_goes_on():
    async def test():
        interruption = Interruption()
        asyncio.get_running_loop().call_soon(interruption.interrupt)
        with interruption:
            await asyncio.sleep(60)
            raise AssertionError("it was not interrupted")
        assert interruption.happened
        await asyncio.sleep(0.01)  # nothing is left over
        return "went on"

    assert asyncio.run(test()) == "went on"


def test_an_interruption_after_the_block_does_nothing():
    async def test():
        interruption = Interruption()
        with interruption:
            await asyncio.sleep(0)
        interruption.interrupt()
        await asyncio.sleep(0.01)
        return interruption.happened

    assert asyncio.run(test()) is False


def test_an_error_and_the_cancelling_of_the_task_itself_go_on():
    async def failing():
        with Interruption():
            raise ValueError("of the block")

    async def waiting():
        with Interruption():
            await asyncio.sleep(60)

    async def test():
        with pytest.raises(ValueError, match="of the block"):
            await failing()
        task = asyncio.create_task(waiting())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return task.cancelled()

    assert asyncio.run(test())

"""Who answers, without HTTP: the fallback goes on, what nobody waited for is logged, children are started again."""

import asyncio
import json
import sys

import pytest
from fastapi import HTTPException, Request

from eval.core.artifacts import file_sha256
from eval.serve.app import Generate, Log, Server
from eval.serve.children import Child
from eval.serve.router import Ask, Outcome, Router
from eval.signoff.keys import new_key, private_key, public_key, public_path
from eval.watch import chain, rollout
from eval.watch.routing import Plan, arm_of, now
from tests.eval.test_rollout import given
from tests.helpers import run as command

PLAN = {"name": "served", "stages": [{"share": 0.5}], "measures": {"errors": {"worse_by": 0.1}}}


class Dying(Child):
    """A child that says two pieces and ends."""

    async def ask(self, request):
        from eval.serve.children import ChildDied

        for piece in ("a", "b"):
            yield {"piece": piece}
        raise ChildDied("gone")


class Steady(Child):
    """A child that goes on counting after its prompt."""

    async def ask(self, request):
        for number in range(request["new_tokens"]):
            yield {"piece": f"{request['prompt']}{number};"}
        yield {"done": True}


def test_the_fallback_goes_on_after_what_was_said(tmp_path):
    release, fallback = Dying("release", {}, 5), Steady("fallback", {}, 5)
    release.facts = fallback.facts = {"fallback": False}

    async def answer():
        for child in (release, fallback):
            child.ready.set()
        router = Router(release, fallback, tmp_path, "cpu", None, None)
        outcome = Outcome(*router.deal(Ask("k", {})))
        ask = Ask("k", {"prompt": "p", "new_tokens": 3})
        return [piece async for piece in router.answer(ask, outcome)], outcome, router.metrics()

    pieces, outcome, metrics = asyncio.run(answer())
    assert pieces == ["a", "b", "pab0;"]
    assert (outcome.arm, outcome.served_by, outcome.error, outcome.why) == (
        "release",
        "fallback",
        True,
        "gone",
    )
    assert outcome.fallback_ms is not None
    assert 'absorb_requests_total{arm="release",served_by="fallback",outcome="failed over"} 1' in metrics


def begun(tmp_path):
    """The folder of a release, as far as a router looks at it, a rollout of it, and who signs its steps."""
    new_key(tmp_path / "ops")
    signer, root, folder = private_key(tmp_path / "ops"), tmp_path / "release", tmp_path / "rollout"
    root.mkdir()
    folder.mkdir()
    (root / "manifest.json").write_text("{}")
    about = {"stage": 1, "time": now(), "reason": "new"}
    state = chain.State(
        release=file_sha256(root / "manifest.json"), contract="c", owner="o", target="cpu", status="running",
        step=1, plan=Plan.model_validate(PLAN), **about,
    )  # fmt: skip
    first = chain.Step(
        number=1, previous=None, by="Ada", public_key=signer.public_key.keyval["public"], decision="START",
        by_hand=True, state=state, **about,
    )  # fmt: skip
    chain.append_step(folder, first, signer)
    return root, folder


def step_of(folder, path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--rollout", folder, "--log", path, "--by", "Ada", "--key", folder.parent / "ops"]
    return rollout.step(given("step", *words))


def test_a_release_that_is_off_keeps_its_requests_and_their_log_is_accepted(tmp_path):
    """A step writes its line before its state: a router that looks between the two trusts neither."""
    root, folder = begun(tmp_path)
    children = Steady("release", {}, 5), Steady("fallback", {}, 5)
    router = Router(*children, root, "cpu", folder, tmp_path / "ops.pub")
    assert router.deal(Ask("k", {})) == ("outside", 0), "before anything was read"
    router.read_rollout()
    assert (router.off, router.state.step) == ("", 1)
    before = (folder / "rollout.json").read_bytes()
    plan = router.state.plan
    rows = [{"key": f"k{i}", "stage": 1, "arm": arm_of(plan, 1, f"k{i}"), "time": now()} for i in range(20)]
    step_of(folder, tmp_path / "1.jsonl", rows)
    after = (folder / "rollout.json").read_bytes()
    (folder / "rollout.json").write_bytes(before)
    router.read_rollout()
    assert "is not what the last line of log.jsonl says" in router.off
    log = Log(tmp_path / "log.jsonl")
    for number in range(20):
        ask = Ask(f"n{number}", {"prompt": "p", "new_tokens": 2})
        log.write(ask, run_through(router, ask, Outcome(*router.deal(ask))))
    log.stream.close()
    written = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {row["served_by"] for row in written} == {"fallback"}
    assert {row["arm"] for row in written} == {"release", "fallback"}
    assert all(row["error"] == (row["arm"] == "release") for row in written)
    (folder / "rollout.json").write_bytes(after)
    step = step_of(folder, tmp_path / "2.jsonl", written)
    assert step.sums["release"].errors == step.sums["release"].requests > 0
    assert step.sums["fallback"].errors == 0
    router.read_rollout()
    assert (router.off, router.state.step) == ("", 3)


def test_a_step_by_another_key_is_obeyed_by_who_knows_both_and_named_by_who_does_not(tmp_path):
    root, folder = begun(tmp_path)
    new_key(tmp_path / "bo")
    words = ["--rollout", folder, "--roll-back", "a user", "--by", "Bo", "--key", tmp_path / "bo"]
    done = command("-m", "eval.watch.rollout", "step", *words)
    ids = [public_key(public_path(tmp_path / name)).keyid[:12] for name in ("ops", "bo")]
    assert f"signed with the keys {', '.join(ids)}: servers and loaders must know each" in done.stdout
    assert "release is off: a user" in done.stdout
    children = Steady("release", {}, 5), Steady("fallback", {}, 5)
    ops, bo = (public_path(tmp_path / name) for name in ("ops", "bo"))
    for keys, status in (
        ([ops, bo], "release is off: the rollout was rolled back on "),
        (ops, f"release is off: log.jsonl was signed with the unknown key {ids[1]}"),
        ([], f"release is off: log.jsonl was signed with the unknown key {ids[1]}"),
    ):
        router = Router(*children, root, "cpu", folder, keys)
        assert router.status == "release is on"
        router.read_rollout()
        assert router.status.startswith(status)


def run_through(router, ask, outcome):
    """What became of a request with both processes there."""

    async def answer():
        for child in router.children.values():
            child.facts = {"fallback": False}
            child.ready.set()
        _ = [piece async for piece in router.answer(ask, outcome)]

    asyncio.run(answer())
    return outcome


def served_by_hand(tmp_path, ready):
    """A server without HTTP: `ready` names the processes that are there."""
    children = [(Steady if name in ready else Child)(name, {}, 0.1) for name in ("release", "fallback")]
    for child in children:
        child.facts = {"fallback": False}
        if child.name in ready:
            child.ready.set()
    router = Router(*children, tmp_path, "cpu", None, None)
    return Server(router, Log(tmp_path / "log.jsonl"), 8, 60)


def test_what_a_client_did_not_wait_for_is_an_error_with_its_time_so_far(tmp_path):
    async def leave():
        server = served_by_hand(tmp_path, ("release", "fallback"))
        lines = server.lines(*server.ask(Generate(prompt="p"), prompt="p", new_tokens=9))
        assert "text" in json.loads(await anext(lines))
        await asyncio.sleep(0.05)
        await lines.aclose()
        assert server.router.in_flight == 0
        server.log.stream.close()
        return server.router.metrics()

    metrics = asyncio.run(leave())
    (row,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert (row["arm"], row["served_by"], row["error"]) == ("release", "", True)
    assert row["why"].startswith("the client gave up")
    assert 50 <= row["latency_ms"] < 5000
    assert 'absorb_requests_total{arm="release",served_by="nobody",outcome="not answered"} 1' in metrics


def test_without_any_process_a_request_is_told_to_come_again_and_logged(tmp_path):
    async def ask():
        server = served_by_hand(tmp_path, ())
        body = Generate(prompt="p")
        with pytest.raises(HTTPException) as error:
            await server.generate(body, Request({"type": "http"}, receive=asyncio.Event().wait))
        parts = server.ask(body, prompt="p", new_tokens=2)
        lines = [json.loads(line) async for line in server.lines(*parts)]
        server.log.stream.close()
        return error.value, lines

    error, lines = asyncio.run(ask())
    assert (error.status_code, error.headers) == (503, {"Retry-After": "1"})
    assert lines == [{"error": "the fallback was not ready for 0.1 s"}]
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["served_by"], row["error"]) for row in rows] == [("", True)] * 2


@pytest.mark.parametrize("odd", ["print('hello')", "print('[' * 9000000)", "print('{}')"])
def test_a_child_that_says_what_is_no_message_is_started_again(tmp_path, odd):
    """A real process: the first one says something odd and stays, the second one behaves."""
    program = (
        "import json, sys, time, pathlib\n"
        f"mark = pathlib.Path({str(tmp_path / 'mark')!r})\n"
        "print(json.dumps({'ready': True, 'fallback': False}), flush=True)\n"
        "if not mark.exists():\n"
        "    mark.touch()\n"
        f"    {odd}\n"
        "    sys.stdout.flush()\n"
        "    time.sleep(600)\n"
        "time.sleep(600)\n"
    )

    async def live():
        child = Child("release", {}, 30)
        child.words = [sys.executable, "-c", program]
        task = asyncio.create_task(child.supervise())
        async with asyncio.timeout(20):
            while child.starts < 2 or not child.ready.is_set():
                await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 20)
        return child

    assert asyncio.run(live()).process.returncode is not None


def test_a_child_that_dies_is_told_to_who_waits_and_is_started_again():
    """A real process in place of the model: it dies at the word `die`."""
    program = (
        "import json, sys\n"
        "print(json.dumps({'ready': True, 'fallback': False}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    asked = json.loads(line)\n"
        "    if asked['prompt'] == 'die': sys.exit(1)\n"
        "    print(json.dumps({'id': asked['id'], 'done': True}), flush=True)\n"
    )

    async def live():
        child = Child("release", {}, 30)
        child.words = [sys.executable, "-c", program]
        task = asyncio.create_task(child.supervise())
        await asyncio.wait_for(child.ready.wait(), 30)
        said = [message async for message in child.ask({"prompt": "hello"})]
        with pytest.raises(RuntimeError, match="release ended"):
            _ = [message async for message in child.ask({"prompt": "die"})]
        await asyncio.wait_for(child.ready.wait(), 30)
        again = [message async for message in child.ask({"prompt": "hello"})]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return said, again, child

    said, again, child = asyncio.run(live())
    assert said == again == [{"done": True}]
    assert child.starts == 2
    assert child.process.returncode is not None, "it does not outlive its server"

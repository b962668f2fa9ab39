"""A rank 0 that chats without a model: it says the words of the last message, one by one.

"die" kills it (SIGKILL), "die 1" rank 1, "mistake" raises an error of the user's, "error" is refused;
"count" says how many messages it was given, "first" the role and text of the first one; "deaf" does not
stop when asked. Other ranks wait until rank 0 has ended.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from base.rank_settings import RankSettings


class Mistake(ValueError):
    exit_code = 2


def main(env: RankSettings, payload: str) -> int:
    options = json.loads(payload)
    folder = Path(options["folder"])
    (folder / f"new-{env.rank}").write_text(str(os.getpid()))
    (folder / f"new-{env.rank}").rename(folder / f"pid-{env.rank}")
    if env.rank:
        assert env.channel_fd is None
        while not (folder / "end").exists():
            if (folder / "die").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.01)
        return 0
    # What the launcher, or the guard after it, has to remove.
    Path(f"/dev/shm/yoke-{env.session}-echo").touch()
    while not all((folder / f"pid-{rank}").exists() for rank in range(env.world_size)):
        time.sleep(0.01)
    assert "torch" not in sys.modules
    assert os.read(0, 1) == b""  # not the terminal
    print("loading ...", end="\r", file=sys.stderr, flush=True)
    time.sleep(options.get("loading_s", 0.0))
    if options.get("broken"):
        raise Mistake("the file is broken")
    with socket.socket(fileno=env.channel_fd) as channel:
        serve(channel, options.get("pause_s", 0.01), folder, options.get("continues", False))
    (folder / "end").touch()
    return 0


def serve(channel: socket.socket, pause_s: float, folder: Path, continues: bool) -> None:
    lines = channel.makefile("rb")

    def send(**message: Any) -> None:
        channel.sendall(json.dumps(message).encode() + b"\n")

    send(ready={"model": "echo", "max_seq_len": 100, "continues": continues, "dtype": "words"})
    cached = 0
    for line in lines:
        request = json.loads(line)
        if "cancel" in request:
            continue  # too late
        if "set" in request:
            reply = {"settings": {"temperature": 0.5, "stop": "a b", "words": request["set"]}}
            send(
                id=request["id"],
                **({"error": "no \x1b such key"} if "bad=1" in request["set"] else reply),
            )
            continue
        number, messages = request["id"], request["messages"]
        asked = messages[-1]["content"]
        if asked == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if asked == "mistake":
            raise Mistake("no such thing")
        if asked == "die 1":
            (folder / "die").touch()
            time.sleep(60)
        if asked == "error":
            send(id=number, error="the conversation is too long")
            continue
        if asked == "escape":
            asked = "\x1b[31mred"
        answer = {
            "count": str(len(messages)),
            "first": f"{messages[0]['role']} {messages[0]['content']}",
        }
        words = answer.get(asked, asked).split(" ")
        said: list[str] = []
        finish = "stop"
        for i, word in enumerate(words):
            said.append(word if i == 0 else f" {word}")
            # The last piece is held back, as half a character would be.
            send(id=number, text=said[-1] if i < len(words) - 1 or i == 0 else "")
            if words[0] == "deaf":
                time.sleep(pause_s)
            elif select.select([channel], [], [], pause_s)[0]:
                line = lines.readline()
                if not line:
                    return
                assert json.loads(line) == {"cancel": number}
                finish = "cancelled"
                break
        prompt = sum(len(message["content"].split()) for message in messages)
        done = {
            "finish": finish, "prompt_tokens": prompt, "cached_tokens": min(cached, prompt - 1),
            "tokens": len(said), "ttft_s": 0.25, "tpot_s": 0.5, "text": "".join(said), "more": 1,
        }  # fmt: skip
        cached = prompt + len(said)
        send(id=number, done=done)


if __name__ == "__main__":
    from launcher.chat.console import CHAT
    from launcher.machine.topology import read_topology
    from launcher.plan import LaunchRequest, plan_launch
    from launcher.spawn import RunOptions, launch, new_session

    ranks = json.loads(sys.argv[1]).get("ranks", 1)
    plan = plan_launch(read_topology(), LaunchRequest(ranks=ranks, comm="gloo"))
    me = "tests.targets.echo_chat"
    sys.exit(launch(plan, RunOptions(grace_s=2.0), new_session(), me, sys.argv[1], CHAT))

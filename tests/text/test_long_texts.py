"""Long texts, which are encoded in another process, under limits of time and memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from tests.builders import write_byte_tokenizer
from tests.server.test_control import wait_until_gone
from tinyvllm.config import ModelFiles
from tinyvllm.errors import RequestError
from tinyvllm.text import long_texts
from tinyvllm.text.long_texts import BYTES_PER_BYTE, LONG_CHARS, LongTexts
from tinyvllm.text.tokenizer import Tokenizer, load_tokenizer

TEXT = "Grüße, Welt! <|end|> " * (LONG_CHARS // 20)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    directory = tmp_path_factory.mktemp("model")
    write_byte_tokenizer(directory)
    return ModelFiles("hf", directory, "tiny")


def test_a_long_text_has_the_same_tokens_wherever_it_is_encoded(files: ModelFiles) -> None:
    here, there = load_tokenizer(files), load_tokenizer(files)
    there.encode_long_texts_elsewhere()
    try:
        for parse_special in (True, False):
            assert there.encode(TEXT, parse_special=parse_special) == here.encode(TEXT, parse_special=parse_special)
        texts = there._long_texts
        assert texts is not None and texts.num_encoded == 2
        process = texts._process
        assert process is not None  # one for both
        process.kill()
        process.wait()
        assert there.encode(TEXT) == here.encode(TEXT), "a process that has died is replaced"
        assert there.encode("short") and texts.num_encoded == 3
    finally:
        there.close()
    assert texts._process is None
    with pytest.raises(RequestError):
        there.encode(TEXT)


def test_a_text_that_takes_too_much_memory_or_time_is_refused_and_the_next_is_not(files: ModelFiles) -> None:
    size = len(TEXT.encode())
    texts = LongTexts(files, base_bytes=2**20 - BYTES_PER_BYTE * size)
    with pytest.raises(
        RequestError, match=f"^messages has {size} bytes of text, which takes too much memory"
    ) as caught:
        texts.encode(TEXT, parse_special=True, param="messages")
    assert caught.value.param == "messages" and texts._process is None
    texts._base_bytes = long_texts.BASE_BYTES
    assert texts.encode(TEXT, parse_special=True, param="messages")
    texts._encode_s = 0.01
    with pytest.raises(RequestError, match=r"too much time \(0.01 s\)"):
        texts.encode(TEXT, parse_special=True, param="messages")
    texts.close()


def test_an_end_does_not_wait_for_a_text(files: ModelFiles) -> None:
    texts, refused = LongTexts(files), list[str]()

    def encode() -> None:
        try:
            texts.encode(TEXT, parse_special=True, param="prompt")
        except RequestError as error:
            refused.append(str(error))

    thread = threading.Thread(target=encode)
    thread.start()
    while texts._process is None:
        pass
    texts.close()
    thread.join()
    assert not thread.is_alive() and refused and texts._process is None


def test_a_long_text_leaves_no_memory_behind(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends after a text that is very long, and otherwise when it has had nothing to do for a while."""
    monkeypatch.setattr(long_texts, "IDLE_S", 0.05)
    texts = LongTexts(files)
    texts.encode(TEXT, parse_special=True, param="prompt")
    process = texts._process
    assert process is not None and process.wait() is not None
    monkeypatch.setattr(long_texts, "IDLE_S", 1000.0)
    monkeypatch.setattr(long_texts, "KEPT_TEXT_BYTES", 1000)
    texts.encode(TEXT, parse_special=True, param="prompt")
    assert texts._process is None


LIMITED = """
import resource, sys
from pathlib import Path
from tinyvllm.config import ModelFiles
from tinyvllm.errors import RequestError
from tinyvllm.text.tokenizer import load_tokenizer

tokenizer = load_tokenizer(ModelFiles("hf", Path(sys.argv[1]), "tiny"))
tokenizer.encode_long_texts_elsewhere()
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 200 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    tokenizer.encode("word " * (4 * 2**20 // 5))
except RequestError as error:
    print("refused:", error)
print(len(tokenizer.encode("still here")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit the address space")
def test_where_memory_is_limited_a_text_is_refused_and_the_process_lives(files: ModelFiles) -> None:
    command = [sys.executable, "-c", LIMITED, str(files.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused: prompt has 4194300 bytes of text, which takes too much memory"), done.stdout
    assert done.stdout.endswith("\n10\n")


KILLED = """
import os, signal, sys, threading, time
from pathlib import Path
from tinyvllm.config import ModelFiles
from tinyvllm.text.long_texts import LongTexts

texts = LongTexts(ModelFiles("hf", Path(sys.argv[1]), "tiny"))
text = "x" * (16 * 2**20)
threading.Thread(target=lambda: texts.encode(text, parse_special=True, param="prompt"), daemon=True).start()
while texts._process is None:
    time.sleep(0.01)
time.sleep(2.0)
print(texts._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_process_does_not_outlive_one_that_is_killed(files: ModelFiles) -> None:
    command = [sys.executable, "-c", KILLED, str(files.path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    wait_until_gone([int(done.stdout)])


def test_texts_are_bounded_and_cut_by_the_longest_token(files: ModelFiles) -> None:
    tokenizer: Tokenizer = load_tokenizer(files)
    longest = tokenizer.most_chars(1)
    assert longest == max(map(len, tokenizer._backend.get_vocab()))
    assert tokenizer.least_tokens("x" * 1000) == 1000 // longest
    text = "".join(chr(ord("a") + index % 26) for index in range(200_000))
    cut = tokenizer.without_middle(text, 100)
    whole, ids = tokenizer.encode(text), tokenizer.encode(cut)
    assert len(cut) < 20_000 and ids[:100] == whole[:100] and ids[-100:] == whole[-100:] and len(ids) > 100
    assert tokenizer.without_middle("short", 100) == "short"

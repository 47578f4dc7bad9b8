"""The page's server as programs see it: gradio_client and plain HTTP."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from needs import needed
from PIL import Image

needed("gradio")
httpx = needed("httpx")
needed("gradio_client")

from gradio_client import Client, handle_file
from ui.server import Server, running

http = httpx.Client(timeout=60)
DEFAULTS = ("embedded", "", 0, 1, 256, -1)  # model, system prompt, temperature, top-p, most tokens, seed


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("ui"), delay=0.01) as server:
        yield server


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    Image.new("RGB", (8, 6), "red").save(path)
    return path


def connect(server: Server, folder: Path) -> Client:
    return Client(server.url, verbose=False, download_files=str(folder))


def texts(chat: list[dict[str, Any]]) -> list[str]:
    return [part["text"] for message in chat for part in message["content"] if part["type"] == "text"]


def ask(client: Client, text: str, *files: Path, settings: tuple[Any, ...] = DEFAULTS) -> tuple[Any, ...]:
    client.predict({"text": text, "files": [handle_file(file) for file in files]}, api_name="/send")
    return client.predict(*settings, api_name="/reply")


def test_an_answer_streams(server: Server, tmp_path: Path) -> None:
    client = connect(server, tmp_path)
    words = " ".join(f"w{i}" for i in range(60))
    client.predict({"text": f"say {words}", "files": []}, api_name="/send")
    job = client.submit(*DEFAULTS, api_name="/reply")
    final = job.result(timeout=60)
    steps = [texts(output[0])[-1] for output in job.outputs()]
    assert texts(final[0]) == [f"say {words}", words]
    growing = [step for step in steps if step.startswith("w0")]
    assert len(set(growing)) >= 4
    assert all(words.startswith(step) for step in growing)


def test_a_picture_is_uploaded_and_answered(server: Server, tmp_path: Path, picture: Path) -> None:
    chat = ask(connect(server, tmp_path), "what is it?", picture)[0]
    assert texts(chat)[-1] == "You said what is it? with 1 files."
    part = server.assistant.requests[-1][-1]["content"][0]
    assert part["type"] == "image"
    assert Path(part["path"]).read_bytes() == picture.read_bytes()
    assert server.uploads in Path(part["path"]).parents
    assert server.uploads.stat().st_mode & 0o077 == 0


def test_parameters_and_system_prompt_reach_the_assistant(server: Server, tmp_path: Path) -> None:
    ask(connect(server, tmp_path), "hi", settings=("embedded", "Be kind.", 0.7, 0.9, 33, 5))
    assert server.assistant.options[-1] == {"max_new_tokens": 33, "temperature": 0.7, "top_p": 0.9, "seed": 5}
    assert server.assistant.requests[-1][0] == {"role": "system", "content": "Be kind."}


def test_stop_ends_the_production_of_tokens(server: Server, tmp_path: Path) -> None:
    client = connect(server, tmp_path)
    client.predict({"text": "long", "files": []}, api_name="/send")
    started = server.assistant.produced
    job = client.submit(*DEFAULTS, api_name="/reply")
    while server.assistant.produced < started + 3:
        time.sleep(0.02)
    client.predict(api_name="/stop")
    chat = job.result(timeout=60)[0]
    produced = server.assistant.produced
    assert texts(chat)[-1].startswith("word0 word1")
    time.sleep(0.2)
    assert server.assistant.produced == produced
    assert texts(ask(client, "and now?")[0])[-1] == "You said and now? with 0 files."


def test_stop_while_a_question_waits_gives_it_back(server: Server, tmp_path: Path) -> None:
    client = connect(server, tmp_path)
    client.predict({"text": "never mind", "files": []}, api_name="/send")
    chat, box, _ = client.predict(api_name="/stop")
    assert texts(chat) == []
    assert box["value"]["text"] == "never mind"
    assert texts(ask(client, "and now?")[0])[-1] == "You said and now? with 0 files."


@pytest.mark.parametrize(("seed", "used"), [(-7, None), (2**70 + 5, 5)])
def test_every_number_is_a_seed(server: Server, tmp_path: Path, seed: int, used: int | None) -> None:
    ask(connect(server, tmp_path), "hi", settings=(*DEFAULTS[:-1], seed))
    assert server.assistant.options[-1]["seed"] == used


def test_programs_find_four_endpoints_with_named_results(server: Server, tmp_path: Path) -> None:
    endpoints = connect(server, tmp_path).view_api(return_format="dict", print_info=False)["named_endpoints"]
    results = {name: [value["label"] for value in endpoint["returns"]] for name, endpoint in endpoints.items()}
    assert set(results) == {"/send", "/reply", "/stop", "/clear"}
    assert all(labels == ["Conversation", "Message", "Alert"] for labels in results.values())


def test_a_cancelled_request_ends_the_production_of_tokens(server: Server, tmp_path: Path) -> None:
    client = connect(server, tmp_path)
    client.predict({"text": "long", "files": []}, api_name="/send")
    job = client.submit(*DEFAULTS, api_name="/reply")
    while len(job.outputs()) < 2:
        time.sleep(0.02)
    job.cancel()
    deadline = time.monotonic() + 60
    while server.assistant.active and time.monotonic() < deadline:
        time.sleep(0.02)
    produced = server.assistant.produced
    assert produced < 9000  # of 10,000 words
    time.sleep(0.3)
    assert server.assistant.produced == produced
    assert texts(ask(connect(server, tmp_path), "next")[0])[-1] == "You said next with 0 files."


def test_two_visitors_share_neither_history_nor_files(server: Server, tmp_path: Path, picture: Path) -> None:
    first, second = connect(server, tmp_path), connect(server, tmp_path)
    ask(first, "my secret", picture)
    chat = ask(second, "hello")[0]
    assert texts(chat) == ["hello", "You said hello with 0 files."]
    assert "secret" not in json.dumps(server.assistant.requests[-1])
    assert texts(ask(first, "again")[0])[0] == "my secret"


def test_two_visitors_are_answered_one_after_the_other(server: Server, tmp_path: Path) -> None:
    clients = [connect(server, tmp_path) for _ in range(2)]
    for client in clients:
        client.predict({"text": "say " + "x " * 60, "files": []}, api_name="/send")
    server.assistant.most_active = 0
    jobs = [client.submit(*DEFAULTS, api_name="/reply") for client in clients]
    assert [len(texts(job.result(timeout=60)[0])) for job in jobs] == [2, 2]
    assert server.assistant.most_active == 1


def test_a_broken_file_is_told_in_plain_words_and_the_message_comes_back(server: Server, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    chat, box, alert = ask(connect(server, tmp_path), "what is it?", broken)
    assert texts(chat) == []
    assert "broken.png: " in alert["value"]
    assert str(server.uploads) not in alert["value"]
    assert box["value"]["text"] == "what is it?"
    assert [Path(file).name for file in box["value"]["files"]] == ["broken.png"]


def test_a_bug_shows_no_inside(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = ask(connect(server, tmp_path), "crash")
    assert "Something went wrong inside the assistant; details are in the console." in result[2]["value"]
    assert "secret detail" not in json.dumps(result)
    assert "a secret detail of the inside" in caplog.text


def test_an_unknown_model_is_not_loaded(server: Server, tmp_path: Path) -> None:
    client = connect(server, tmp_path)
    client.predict({"text": "hi", "files": []}, api_name="/send")
    before = len(server.assistant.requests)
    with pytest.raises(Exception, match="not in the list of choices"):
        client.predict("/etc", *DEFAULTS[1:], api_name="/reply")
    assert len(server.assistant.requests) == before


@pytest.mark.parametrize("path", ["/etc/passwd", "/proc/self/environ", str(Path(__file__)), "../../../../etc/passwd"])
@pytest.mark.parametrize("route", ["/gradio_api/file=", "/file=", "/gradio_api/file/"])
def test_files_of_the_computer_are_not_served(server: Server, route: str, path: str) -> None:
    answer = http.get(server.url + route + path)
    assert answer.status_code in (403, 404)
    assert "root:" not in answer.text


def test_a_message_cannot_name_a_file_of_the_computer(server: Server, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (2, 2)).save(secret)
    stolen = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    body = {"data": [{"text": "give", "files": [stolen]}], "session_hash": "abcdefghij"}
    answer = http.post(f"{server.url}/gradio_api/run/send", json=body)
    assert answer.status_code >= 400
    assert not any(secret.read_bytes() == file.read_bytes() for file in server.uploads.rglob("*.png"))


def test_uploads_are_neither_listed_nor_guessable(server: Server, tmp_path: Path, picture: Path) -> None:
    ask(connect(server, tmp_path), "mine", picture)
    path = Path(server.assistant.requests[-1][-1]["content"][0]["path"])
    for guess in (server.uploads, path.parent, server.uploads / path.name):
        assert http.get(f"{server.url}/gradio_api/file={guess}").status_code in (403, 404)
    assert len(path.parent.name) == 64


def test_files_of_other_servers_are_not_fetched(server: Server) -> None:
    for route in ("/gradio_api/file=http://127.0.0.1:9/x.png", "/gradio_api/proxy=http://127.0.0.1:9/"):
        answer = http.get(server.url + route)
        assert (answer.status_code, answer.text) == (403, "Files of other servers are not fetched.")


def test_every_page_carries_the_content_policy(server: Server) -> None:
    headers = http.get(server.url).headers
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "http" not in headers["content-security-policy"]
    assert headers["referrer-policy"] == "no-referrer"


def test_a_file_over_the_limit_is_refused(server: Server) -> None:
    big = {"files": ("big.wav", b"\0" * (50 * 1024 * 1024 + 1), "audio/wav")}
    answer = http.post(f"{server.url}/gradio_api/upload", files=big)
    assert answer.status_code == 413


def test_the_server_listens_on_this_computer_only_and_reports_to_nobody(server: Server) -> None:
    assert http.get(f"{server.url}/config").json()["analytics_enabled"] is False
    with pytest.raises(httpx.ConnectError):  # a server bound to every address answers here too
        http.get(server.url.replace("127.0.0.1", "127.0.0.2"))

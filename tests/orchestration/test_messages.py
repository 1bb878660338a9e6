"""Messages over Pipes arrive whole, however they are written."""

import json
import time

from orchestration.launchers.messages import MessageFiles


class Heard:
    """Stands where Dagster handles messages."""

    def __init__(self) -> None:
        self.messages, self.failures = [], []

    def handle_message(self, message) -> None:
        self.messages.append(message)

    def report_pipes_framework_exception(self, origin, exc_info) -> None:
        self.failures.append((origin, exc_info))


def reading(heard: Heard, *paths):
    return MessageFiles(paths).read_messages(heard)  # pyright: ignore[reportArgumentType]


def line(method: str, **params) -> str:
    return json.dumps({"__dagster_pipes_version": "0.1", "method": method, "params": params}) + "\n"


def test_a_message_met_half_written_is_read_whole(tmp_path):
    said = [{"method": "log", "params": {"picture": "x" * 50_000}}, {"method": "closed"}]
    text = "".join(json.dumps(message) + "\n" for message in said)
    heard = Heard()
    with reading(heard, tmp_path / "messages") as params, open(params["path"], "a") as file:
        for start in range(0, len(text), 9_000):
            file.write(text[start : start + 9_000])
            file.flush()
            time.sleep(0.04)  # longer than the reader waits between looks
    assert heard.messages == said
    assert not heard.failures


def test_what_is_no_message_is_reported(tmp_path):
    heard = Heard()
    with reading(heard, tmp_path / "messages") as params, open(params["path"], "a") as file:
        file.write("not json\n")
    assert heard.messages == []
    assert "MessageFiles" in heard.failures[0][0]


def test_a_job_that_is_started_again_goes_on_in_its_file(tmp_path):
    """The first process closes, the second is killed in the middle of a line, the third ends."""
    whole = line("log", message="whole")
    text = line("opened") + line("closed") + line("opened") + whole[:40] + line("opened") + whole + line("closed")
    (tmp_path / "messages").write_text(text)
    heard = Heard()
    with reading(heard, tmp_path / "messages"):
        pass
    assert [message["method"] for message in heard.messages] == ["opened", "opened", "opened", "log", "closed"]
    assert not heard.failures


def test_several_processes_are_closed_when_all_of_them_are(tmp_path):
    paths = [tmp_path / "0", tmp_path / "1"]
    paths[0].write_text(line("opened") + line("log", message="a") + line("closed"))
    paths[1].write_text(line("opened") + line("log", message="b"))
    heard = Heard()
    with reading(heard, *paths):
        pass
    assert [message["method"] for message in heard.messages].count("closed") == 0
    with paths[1].open("a") as file:
        file.write(line("closed"))
    heard = Heard()
    with reading(heard, *paths):
        pass
    assert sorted(m["params"]["message"] for m in heard.messages if m["method"] == "log") == ["a", "b"]
    assert [message["method"] for message in heard.messages][-1] == "closed"

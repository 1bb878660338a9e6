"""Messages over Pipes arrive whole, however they are written."""

import json
import time

from orchestration.launchers.messages import TemporaryFileReader


class Heard:
    """Stands where Dagster handles messages."""

    def __init__(self) -> None:
        self.messages, self.failures = [], []

    def handle_message(self, message) -> None:
        self.messages.append(message)

    def report_pipes_framework_exception(self, origin, exc_info) -> None:
        self.failures.append((origin, exc_info))


def reading(heard: Heard):
    return TemporaryFileReader().read_messages(heard)  # pyright: ignore[reportArgumentType]


def test_a_message_met_half_written_is_read_whole():
    said = [{"method": "log", "params": {"picture": "x" * 50_000}}, {"method": "closed"}]
    text = "".join(json.dumps(message) + "\n" for message in said)
    heard = Heard()
    with reading(heard) as params, open(params["path"], "a") as file:
        for start in range(0, len(text), 9_000):
            file.write(text[start : start + 9_000])
            file.flush()
            time.sleep(0.03)  # the reader looks every hundredth of a second
    assert heard.messages == said
    assert not heard.failures


def test_what_is_no_message_is_reported():
    heard = Heard()
    with reading(heard) as params, open(params["path"], "a") as file:
        file.write("not json\n")
    assert heard.messages == []
    assert "WholeLineReader" in heard.failures[0][0]

"""People are told by real HTTP and SMTP; what can't be delivered, and what is set wrongly, is said."""

import pytest
from local_servers import mail_server, webhook

from m2m.errors import ConfigError
from orchestration.people import NotTold, People, people_to_tell


@pytest.fixture(autouse=True)
def nobody_is_set(monkeypatch):
    for name in ("M2M_WEBHOOK", "M2M_EMAIL", "M2M_SMTP", "M2M_SMTP_USER", "M2M_SMTP_PASSWORD", "M2M_EMAIL_FROM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("orchestration.people.time.sleep", lambda seconds: None)


def test_by_default_nobody_is_told():
    assert people_to_tell().ways == []
    people_to_tell().tell("subject", "text")


def test_a_webhook_gets_one_text():
    with webhook() as hook:
        People(webhook=hook.url).tell("a run failed", "why\nwhere")
    assert hook.heard == [{"text": "a run failed\nwhy\nwhere"}]


def test_a_server_that_stumbles_is_asked_again():
    with webhook() as hook:
        hook.answers = [503, 500]
        People(webhook=hook.url).tell("a run failed", "why")
    assert len(hook.heard) == 1


def test_a_letter_arrives():
    with mail_server() as (port, letters):
        People(email="a@example.org, b@example.org", smtp=f"smtp://127.0.0.1:{port}").tell("a run failed", "why")
    (letter,) = letters
    assert "Subject: a run failed\r\n" in letter and "To: a@example.org, b@example.org" in letter and "why" in letter


def test_one_way_that_fails_does_not_stop_the_other():
    with mail_server() as (port, letters), pytest.raises(NotTold, match=r"webhook: .*refused"):
        People(webhook="http://127.0.0.1:9/", email="a@b.org", smtp=f"smtp://127.0.0.1:{port}").tell("subject", "text")
    assert len(letters) == 1


@pytest.mark.parametrize(
    ("set_to", "said"),
    [
        ({"M2M_WEBHOOK": "hooks.example.org"}, "M2M_WEBHOOK must be an http"),
        ({"M2M_EMAIL": "a@b.org"}, "belong together"),
        ({"M2M_EMAIL": "a@b.org", "M2M_SMTP": "mail.example.org"}, "M2M_SMTP must begin with one of smtp://"),
    ],
)
def test_what_is_set_wrongly_is_named(monkeypatch, set_to, said):
    for name, value in set_to.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        people_to_tell()


def test_the_address_is_known_by_the_variables_name(monkeypatch):
    """A webhook's address is a secret: whoever has it can post."""
    monkeypatch.setenv("M2M_WEBHOOK", "https://hooks.example.org/secret")
    people = people_to_tell()
    assert people.ways == ["webhook"] and "secret" not in str(people)

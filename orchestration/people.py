"""Who is told when something needs a person, and how.

Belongs here: delivering a few lines by webhook and e-mail. Not here: what is worth telling (`orchestration.sensors`).
"""

import json
import os
import smtplib
import time
import urllib.error
import urllib.request
from email.message import EmailMessage
from urllib.parse import urlsplit

import dagster as dg
from pydantic import Field

from m2m.errors import ConfigError, M2MError

_TRIES = 3
_SECONDS = 10  # for one try


class NotTold(M2MError):
    """Nobody could be reached by a way that is configured; says by which and why."""


class People(dg.ConfigurableResource):
    """The people who look after the pipeline, reached by every way that is set."""

    webhook: str = Field(default="", description="takes a POST of {'text': ...}: Slack, Mattermost, Teams, ntfy")
    email: str = Field(default="", description="addresses, separated by commas")
    smtp: str = Field(default="", description="smtp://HOST[:25], smtp+starttls://HOST[:587] or smtps://HOST[:465]")
    smtp_user: str = Field(default="", description="also the sender, unless `sender` is set")
    smtp_password: str = ""
    sender: str = ""

    @property
    def ways(self) -> list[str]:
        """How people are told; nothing where nothing is set."""
        return [*(["webhook"] if self.webhook else []), *(["e-mail"] if self.email else [])]

    def tell(self, subject: str, text: str) -> None:
        """Deliver by every way; a way that fails is tried three times and does not stop the others.

        Raises:
            NotTold: a way failed each time.
        """
        failed = []
        for way, send in (("webhook", self._post), ("e-mail", self._mail)):
            if way not in self.ways:
                continue
            for left in reversed(range(_TRIES)):
                try:
                    send(subject, text)
                    break
                except (OSError, smtplib.SMTPException) as error:  # urllib's errors are OSErrors
                    if not left:
                        failed.append(f"{way}: {error}")
                    else:
                        time.sleep(1)
        if failed:
            raise NotTold(f"{subject}: people could not be told. {'; '.join(failed)}")

    def _post(self, subject: str, text: str) -> None:
        said = json.dumps({"text": f"{subject}\n{text}"}).encode()
        request = urllib.request.Request(self.webhook, said, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=_SECONDS):  # an answer of 400 and more raises
            pass

    def _mail(self, subject: str, text: str) -> None:
        server = urlsplit(self.smtp)
        letter = EmailMessage()
        letter["Subject"], letter["To"] = subject, self.email
        letter["From"] = self.sender or self.smtp_user or "m2m@localhost"
        letter.set_content(text)
        kind = smtplib.SMTP_SSL if server.scheme == "smtps" else smtplib.SMTP
        with kind(server.hostname or "localhost", server.port or _PORTS[server.scheme], timeout=_SECONDS) as post:
            if server.scheme == "smtp+starttls":
                post.starttls()
            if self.smtp_user:
                post.login(self.smtp_user, self.smtp_password)
            post.send_message(letter)


_PORTS = {"smtp": 25, "smtp+starttls": 587, "smtps": 465}
_VARIABLES = {
    "webhook": "M2M_WEBHOOK",
    "email": "M2M_EMAIL",
    "smtp": "M2M_SMTP",
    "smtp_user": "M2M_SMTP_USER",
    "smtp_password": "M2M_SMTP_PASSWORD",
    "sender": "M2M_EMAIL_FROM",
}


def people_to_tell() -> People:
    """Those of `M2M_WEBHOOK` and `M2M_EMAIL`; Dagster keeps and shows the variables' names, not what they hold.

    Raises:
        ConfigError: an address that can't be one, or e-mail without a server.
    """
    given = {field: os.environ[name] for field, name in _VARIABLES.items() if os.environ.get(name)}
    webhook, smtp = given.get("webhook"), given.get("smtp")
    if webhook and urlsplit(webhook).scheme not in ("http", "https"):
        raise ConfigError("M2M_WEBHOOK must be an http:// or https:// address")
    if ("email" in given) != bool(smtp):
        raise ConfigError("M2M_EMAIL and M2M_SMTP belong together: to whom, and the server that takes it")
    if smtp and urlsplit(smtp).scheme not in _PORTS:
        raise ConfigError(f"M2M_SMTP must begin with one of {', '.join(f'{scheme}://' for scheme in _PORTS)}")
    return People(**{field: dg.EnvVar(_VARIABLES[field]) for field in given})

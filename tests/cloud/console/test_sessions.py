"""Who gets in, what the cookie is, what a browser is told to refuse, and which forms are taken."""

from __future__ import annotations

import hashlib
import re
import time
from http.cookies import SimpleCookie

import httpx
import pytest
from sqlalchemy import select, update

from spvtpm.cloud import auth, tables
from spvtpm.cloud.console.sessions import SESSION_S, SESSIONS_PER_TOKEN
from spvtpm.cloud.console.throttle import ATTEMPTS, ATTEMPTS_OF_PEER, Throttle
from tests.cloud.console.conftest import Console

LOGIN = "/console/login"
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self'",
    "form-action": "'self'",
    "frame-ancestors": "'none'",
    "base-uri": "'none'",
}


def log_in(console: Console, token: str, **headers: str) -> httpx.Response:
    """One attempt, with the headers of a browser that is on the login page, or others."""
    headers = {"Origin": console.origin} | {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(console.origin + LOGIN, data={"token": token}, headers=headers)


def test_without_a_session_every_page_leads_to_the_login_and_back(console: Console) -> None:
    with console.client() as client:
        for path in ("/console/", "/console/vms", "/console/hosts", "/console/operations"):
            answer = client.get(path)
            assert (answer.status_code, answer.headers["location"]) == (303, f"{LOGIN}?to={path}")
            assert client.get(path, headers={"Accept": "text/event-stream"}).text == "event: reload\ndata:\n\n"
        form = {"token": console.filled.tokens["alice"], "to": "/console/vms"}
        assert client.post(LOGIN, data=form).headers["location"] == "/console/vms"


@pytest.mark.parametrize(
    "to", ["https://evil.example/", "//evil.example/", "/v1/me", "/console/vms\r\nX: y", "/console\\x"]
)
def test_a_login_leads_nowhere_but_into_the_console(console: Console, to: str) -> None:
    with console.client() as client:
        answer = client.post(LOGIN, data={"token": console.filled.tokens["alice"], "to": to})
    assert answer.headers["location"] == "/console/"


def test_the_cookie_is_random_for_this_site_alone_and_hidden_from_scripts(console: Console) -> None:
    answer = log_in(console, console.filled.tokens["alice"])
    (cookie,) = SimpleCookie(answer.headers["set-cookie"]).values()
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", cookie.value)
    assert cookie["httponly"] is True
    assert cookie["samesite"] == "strict"
    assert cookie["path"] == "/console"
    assert int(cookie["max-age"]) == SESSION_S
    assert not cookie["secure"]
    with console.filled.database.read() as connection:
        (row,) = connection.execute(select(tables.console_sessions)).all()
    assert row.sha256 == hashlib.sha256(cookie.value.encode()).digest()
    assert row.expires_s == pytest.approx(time.time() + SESSION_S, abs=60)
    assert console.filled.tokens["alice"] not in str(answer.headers) + answer.text


def test_the_cookie_is_secure_where_the_browser_has_tls(console: Console) -> None:
    """Which may end at a proxy, so that this process sees none."""
    answer = log_in(console, console.filled.tokens["alice"], Origin=console.origin.replace("http:", "https:"))
    (cookie,) = SimpleCookie(answer.headers["set-cookie"]).values()
    assert cookie["secure"] is True


def test_a_terminal_elsewhere_is_told_to_use_tls(console: Console) -> None:
    with console.client("alice") as client:
        assert f"spvtpm login {console.origin}" in client.get("/console/").text
        assert "spvtpm login https://cloud.example<" in client.get("/console/", headers={"Host": "cloud.example"}).text
        for hostile in ("[::1", "a b", "<script>", "127.0.0.1@evil.example"):
            answer = client.get("/console/", headers={"Host": hostile})
            assert answer.status_code == 200
            assert "<script>" not in answer.text


def test_every_answer_tells_the_browser_to_take_nothing_from_elsewhere(console: Console) -> None:
    with console.client("alice") as client:
        for path in ("/console", "/console/", "/console/vms", "/console/nothing", "/console/static/console.js"):
            headers = client.get(path).headers
            rules = (rule.strip().partition(" ") for rule in headers["content-security-policy"].split(";"))
            assert {name: sources for name, _, sources in rules} == POLICY
            assert headers["x-content-type-options"] == "nosniff"
            assert "static" in path or headers["cache-control"] == "no-store"
        page = client.get("/console/").text
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon[a-z]+=|https?://(?!127\.0\.0\.1)", page)


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
    ids=str,
)
def test_a_form_of_another_origin_is_refused(console: Console, headers: dict[str, str]) -> None:
    assert log_in(console, console.filled.tokens["alice"], **headers).status_code == 403
    with console.client("alice") as client:
        assert client.post("/console/logout", headers=headers).status_code == 403
        assert client.get("/console/").status_code == 200


def test_a_form_that_does_not_say_where_it_is_from_is_refused(console: Console) -> None:
    answer = httpx.post(console.origin + LOGIN, data={"token": console.filled.tokens["alice"]})
    assert answer.status_code == 403
    assert "set-cookie" not in answer.headers


def test_logging_out_ends_the_session_itself(console: Console) -> None:
    with console.client("alice") as client:
        cookies = dict(client.cookies)
        assert client.post("/console/logout").headers["location"] == LOGIN
        assert not client.cookies
    assert httpx.get(f"{console.origin}/console/", cookies=cookies).status_code == 303


def test_a_session_ends_with_its_time_and_with_its_token(console: Console) -> None:
    with console.client("alice") as alice, console.client("bob") as bob:
        with console.filled.database.write() as connection:
            token_id = auth.principal_of(connection, console.filled.tokens["alice"]).token_id
            auth.remove_token(connection, "alice", token_id)
            connection.execute(update(tables.console_sessions).values(expires_s=time.time() - 1))
        assert alice.get("/console/").status_code == 303
        assert bob.get("/console/").status_code == 303


def test_a_live_page_ends_with_its_session(console: Console) -> None:
    with (
        console.client("alice") as client,
        client.stream("GET", "/console/", headers={"Accept": "text/event-stream"}) as stream,
    ):
        lines = stream.iter_lines()
        assert next(lines) == "event: page"
        with console.filled.database.write() as connection:
            token_id = auth.principal_of(connection, console.filled.tokens["alice"]).token_id
            auth.remove_token(connection, "alice", token_id)
        assert [line for line in lines if line.startswith("event")][-1] == "event: reload"


def test_live_pages_end_when_the_platform_does(console: Console) -> None:
    with (
        console.client("alice") as client,
        client.stream("GET", "/console/", headers={"Accept": "text/event-stream"}) as stream,
    ):
        lines = stream.iter_lines()
        assert next(lines) == "event: page"
        console.process.terminate()
        list(lines)  # ends
    console.process.wait(30)


def test_a_token_has_so_many_sessions(console: Console) -> None:
    with console.client("alice") as oldest:
        for _ in range(SESSIONS_PER_TOKEN):
            assert log_in(console, console.filled.tokens["alice"]).status_code == 303
        assert oldest.get("/console/").status_code == 303
    with console.filled.database.read() as connection:
        assert len(connection.execute(select(tables.console_sessions)).all()) == SESSIONS_PER_TOKEN


@pytest.mark.parametrize("token", ["", "spv_" + "x" * 43, "x" * 10_000, "<script>", "\0"])
def test_no_token_no_session(console: Console, token: str) -> None:
    answer = log_in(console, token)
    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers
    assert not token or token not in answer.text


def test_an_ended_token_opens_nothing(console: Console) -> None:
    console.filled.add_user("carol", "read", expires_s=time.time() - 1)
    assert log_in(console, console.filled.tokens["carol"]).status_code == 401


def test_who_fails_too_often_waits_also_with_a_right_token(console: Console) -> None:
    statuses = [log_in(console, "spv_" + "x" * 43).status_code for _ in range(ATTEMPTS)]
    assert statuses == [401] * ATTEMPTS
    refused = log_in(console, console.filled.tokens["alice"])
    somebody_else = log_in(console, console.filled.tokens["alice"], X_Forwarded_For="192.0.2.4")  # behind a proxy
    assert somebody_else.status_code == 303
    assert refused.status_code == 429
    assert "set-cookie" not in refused.headers
    assert int(refused.headers["retry-after"]) > 0


def test_who_makes_up_what_a_proxy_would_say_waits_as_well(console: Console) -> None:
    with httpx.Client(base_url=console.origin, headers={"Origin": console.origin}, timeout=30) as client:

        def attempt(number: int, token: str) -> int:
            headers = {"X-Forwarded-For": f"192.0.2.{number % 256}, 198.51.100.{number}"}
            return client.post(LOGIN, data={"token": token}, headers=headers).status_code

        statuses = [attempt(number, "spv_" + "x" * 43) for number in range(ATTEMPTS_OF_PEER)]
        assert statuses == [401] * ATTEMPTS_OF_PEER
        assert attempt(ATTEMPTS_OF_PEER, console.filled.tokens["alice"]) == 429


def test_right_tokens_are_no_failed_attempts() -> None:
    throttle = Throttle()
    for _ in range(ATTEMPTS_OF_PEER + 1):
        throttle.attempt("192.0.2.1", "")
        throttle.succeeded("192.0.2.1", "")


@pytest.mark.parametrize("body", [b"\xff\xfe", b"a=1&" * 40_000, b"a&b=1&" * 20])
def test_a_form_that_is_none_is_refused(console: Console, body: bytes) -> None:
    answer = httpx.post(console.origin + LOGIN, content=body, headers={"Origin": console.origin})
    assert answer.status_code in {400, 413}

"""The file in which measurements of links are kept."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tfdist.cluster.links import LinkMeasurement, links_file, read, record

pytestmark = pytest.mark.quick

LINK = LinkMeasurement("multi_worker", 2, 1, 0.0015, 2.5e8, "2026-11-29T03:00:00+00:00")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TFDIST_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_measurements_are_kept_in_order(cache: Path) -> None:
    assert read() == []
    slower = replace(LINK, strategy="horovod", latency_s=0.25)
    assert record(LINK) == record(slower) == cache / "links.json" == links_file()
    assert read() == [LINK, slower]
    assert [entry.name for entry in cache.iterdir()] == ["links.json"]


def test_only_the_newest_are_kept() -> None:
    for workers in range(1, 111):
        record(replace(LINK, workers=workers))
    assert [link.workers for link in read()] == list(range(11, 111))


def test_a_reader_never_sees_half_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    record(LINK)
    with ThreadPoolExecutor(4) as pool:
        writes = [pool.submit(record, LINK) for _ in range(40)]
        while not all(write.done() for write in writes):
            assert read()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"version": 1, "links": 3}',
        '{"version": 1, "links": [{"strategy": "horovod"}]}',
        json.dumps({"links": [{**asdict(LINK), "bytes_per_s": 0}]}),
        json.dumps({"links": [{**asdict(LINK), "latency_s": -1.0}]}),
        json.dumps({"links": [{**asdict(LINK), "workers": True}]}),
        json.dumps({"links": [{**asdict(LINK), "measured_at": None}]}),
        '{"links": [{"latency_s": NaN}]}',
    ],
)
def test_a_damaged_file_is_ignored_with_a_line(
    content: str, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.mkdir()
    links_file().write_text(content)
    assert read() == []
    message = capsys.readouterr().err
    assert str(links_file()) in message
    assert "it is damaged" in message
    assert message.count("\n") == 1
    record(LINK)
    assert read() == [LINK]


def test_a_link_predicts_a_time() -> None:
    assert LINK.seconds(0) == pytest.approx(0.0015)
    assert LINK.seconds(2.5e8) == pytest.approx(1.0015)

"""The scorer on Ray Serve: the same scores, a token, and replicas that die under load."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from operator import gt

import httpx
import pytest
from conftest import free_port
from metric_pages import Series, needed, read, scrape, ungrouped, wait_for
from reward_toys import reward_model

from metaalign_rl.config.schema import Config
from metaalign_rl.core.errors import UserError
from metaalign_rl.runtime import ray_session
from reward import Scorer
from reward.serving.client import RemoteScorer

pytestmark = pytest.mark.slow
ROWS = [
    {
        "system_info": "say red",
        "messages": [{"role": "user", "content": "what color is it"}],
        "response": "red " * length,
    }
    for length in range(1, 9)
]


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    """The URL of two replicas in a Ray instance of their own."""
    from ray import serve

    from metaalign_rl.serving.scorer_service import Arguments, application

    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAALIGN_REWARD_TOKEN", "secret")
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        with ray_session.connect(Config()):
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            serve.run(application(Arguments(model=str(reward_model()), cpus=0.5, replicas=2, dtype="float32")))
            yield f"http://127.0.0.1:{port}"
            serve.shutdown()


def replicas() -> list[str]:
    import ray

    names = ray.util.list_named_actors(all_namespaces=True)
    return [found["name"] for found in names if found["name"].startswith("SERVE_REPLICA")]


def test_replicas_give_the_same_scores_as_the_scorer(service: str) -> None:
    expected = Scorer.from_pretrained(reward_model(), device="cpu", dtype="float32").score(ROWS)
    for found, score in zip(RemoteScorer(service).score(ROWS), expected, strict=True):
        assert found.logits == pytest.approx(score.logits, abs=1e-4)


def test_requests_without_the_token_are_refused(service: str) -> None:
    assert httpx.post(f"{service}/score", json={"rows": ROWS}).status_code == 401
    with pytest.raises(UserError, match="401"):
        RemoteScorer(service, "wrong").score(ROWS)


def test_rays_metrics_page_has_the_scorers_series_of_dashboards_and_alerts(service: str) -> None:
    import ray

    RemoteScorer(service).score(ROWS)
    (port,) = {node["MetricsExportPort"] for node in ray.nodes()}
    seen: Series = {}

    def missing() -> set[str]:
        seen.update(read(scrape(port)))
        return needed("ray_metaalign_reward_").keys() - seen.keys()

    wait_for(missing)
    for name, labels in needed("ray_metaalign_reward_").items():
        assert labels <= seen[name], name
    assert not ungrouped(seen)


def test_when_a_replica_is_killed_under_load_no_request_fails(service: str) -> None:
    import ray

    expected = Scorer.from_pretrained(reward_model(), device="cpu", dtype="float32").score(ROWS)
    ended, counts = threading.Event(), [0] * 8

    def ask(number: int) -> None:
        remote = RemoteScorer(service, timeout=30)
        while not ended.is_set():
            for found, score in zip(remote.score(ROWS), expected, strict=True):
                assert found.logits == pytest.approx(score.logits, abs=1e-4)
            counts[number] += 1

    def wait_until(condition: Callable[[], bool], message: str) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, message
            time.sleep(0.1)

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(ask, number) for number in range(8)]
        try:
            wait_until(lambda: min(counts) > 0, "a client got no scores")
            victim, before = replicas()[0], list(counts)
            ray.kill(ray.get_actor(victim, namespace="serve"))
            wait_until(lambda: victim not in replicas() and len(replicas()) == 2, "the replica was not replaced")
            wait_until(lambda: all(map(gt, counts, before)), "a client got no more scores")
        finally:
            ended.set()
        for client in clients:
            client.result(60)

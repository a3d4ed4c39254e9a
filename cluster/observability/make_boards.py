"""Write the Grafana dashboards in dashboards/: `python cluster/observability/make_boards.py`.

Each panel's description is the metric's row in docs/metrics.md: its meaning, healthy values and warning sign.
"""

import json
import re
from pathlib import Path
from typing import Any

from metaalign_rl.monitoring import metric_registry

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).parent / "dashboards"
COLUMNS, WIDTH, HEIGHT = 24, 8, 8  # columns of Grafana's grid, width and height of a panel
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
RUN = 'run=~"$run"'
ALL = f'{RUN},tier="all",relation="all"'
BY_TIER = f'{RUN},tier!="all",relation="all"'
BY_RELATION = f'{RUN},tier="all",relation!="all"'
APPLICATION = 'application=~"$application"'
PART_OF_RUN = f"and on (SessionName) ray_metaalign_ppo_steps{{{RUN}}}"

Panel = dict[str, Any]
Query = tuple[str, str]  # expression and legend


def explained() -> dict[str, str]:
    """Read the description of each metric from the tables of docs/metrics.md."""
    found = {}
    for line in (ROOT / "docs/metrics.md").read_text("utf-8").splitlines():
        if names := re.match(r"\| `([a-z_]+)`[^|]*\|", line):
            meaning, *signs = [cell.strip() for cell in line[names.end() :].strip(" |").split("|")]
            labelled = zip(("Healthy", "Warning sign"), signs, strict=False)
            parts = [meaning, *(f"{label}: {sign}" for label, sign in labelled if sign)]
            found[names[1]] = ". ".join(part[0].upper() + part[1:] for part in parts) + "."
    return found


METRICS = explained()


def panel(title: str, description: str, unit: str, *queries: Query, limit: float | None = None, **custom: Any) -> Panel:
    """Return a time series panel. `limit` draws a red line at the warning threshold."""
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if limit is not None:
        steps.append({"color": "red", "value": limit})
        custom["thresholdsStyle"] = {"mode": "line"}
    return {
        "type": "timeseries",
        "title": title,
        "description": description,
        "datasource": SOURCE,
        "fieldConfig": {
            "defaults": {
                "unit": unit,
                "thresholds": {"mode": "absolute", "steps": steps},
                "custom": {"spanNulls": 120_000, "showPoints": "auto", **custom},
            },
            "overrides": [],
        },
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + place), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
            for place, (expression, legend) in enumerate(queries)
        ],
    }


def ppo(metric: str, labels: str = RUN) -> str:
    return f"ray_{metric_registry.PREFIX}{metric}{{{labels}}}"


def metric(title: str, unit: str, *names: str, limit: float | None = None) -> Panel:
    """Return a panel of step metrics, with their descriptions from the documentation."""
    queries = [
        (ppo(name, ALL if name in metric_registry.RESPONSE_METRICS else RUN), f"{{{{run}}}} {name}") for name in names
    ]
    text = METRICS[names[0]] if len(names) == 1 else "\n".join(f"- `{name}`: {METRICS[name]}" for name in names)
    return panel(title, text, unit, *queries, limit=limit)


def cut(title: str, unit: str, name: str, by: str) -> Panel:
    """Return a panel of one metric by tier or by relation."""
    labels = {"tier": BY_TIER, "relation": BY_RELATION}[by]
    return panel(title, METRICS[name], unit, (ppo(name, labels), f"{{{{run}}}} {{{{{by}}}}}"))


def learning() -> list[Panel]:
    return [
        metric("Reward, proxy and gold", "percentunit", "reward", "proxy", "gold"),
        panel(
            "Proxy minus gold",
            "The proxy minus gold. A growing gap means reward hacking.",
            "percentunit",
            (f"{ppo('proxy', ALL)} - {ppo('gold', ALL)}", "{{run}}"),
        ),
        metric("KL to the reference", "short", "kl", limit=0.5),
        cut("Gold by tier", "percentunit", "gold", "tier"),
        cut("Gold by relation", "percentunit", "gold", "relation"),
        cut("Reward by tier", "percentunit", "reward", "tier"),
        cut("Proxy by relation", "percentunit", "proxy", "relation"),
        cut("KL by relation", "short", "kl", "relation"),
        metric("Surprisal and entropy", "short", "surprisal", "entropy"),
        cut("Refusals by tier", "percentunit", "refused", "tier"),
        cut("Response length by tier (tokens)", "short", "response_tokens", "tier"),
        metric("Truncated responses", "percentunit", "unfinished", "held_out_unfinished"),
        metric("Responses with other tokens", "percentunit", "retokenized"),
        metric("Held-out prompts", "percentunit", "held_out_gold", "held_out_reward"),
        metric("Length penalty", "short", "penalty"),
        metric("Prompts left out", "percentunit", "skipped_groups"),
    ]


def time() -> list[Panel]:
    seconds = f"sum by (run, part) (rate({ppo('seconds_total')}[$__rate_interval]))"
    buckets = f"sum by (run, le) (rate({ppo('step_seconds_bucket')}[$__rate_interval]))"
    parts = "; ".join(f"`{name}`: {text}" for name, text in metric_registry.PARTS.items())
    return [
        panel(
            "Where the time goes",
            f"Share of the steps' wall time by part. {parts}.",
            "percentunit",
            (f"{seconds} / on (run) group_left () sum by (run) ({seconds})", "{{run}} {{part}}"),
            stacking={"mode": "normal"},
            fillOpacity=60,
        ),
        panel(
            "Responses per second",
            "Responses generated, divided by the wall time of the steps.",
            "short",
            (f"rate({ppo('samples_total')}[$__rate_interval])", "{{run}}"),
        ),
        panel(
            "Seconds per step",
            "Median and 90th percentile, within the resolution of the histogram's buckets.",
            "s",
            (f"histogram_quantile(0.5, {buckets})", "{{run}} median"),
            (f"histogram_quantile(0.9, {buckets})", "{{run}} 90th percentile"),
        ),
        panel(
            "Steps done",
            "The last finished step, and ppo.steps.",
            "short",
            (ppo("step"), "{{run}} finished"),
            (ppo("steps"), "{{run}} total"),
        ),
    ]


def health() -> list[Panel]:
    return [
        panel(
            "Mismatch between engine and learner",
            METRICS["mismatch"],
            "short",
            (ppo("mismatch"), "{{run}}"),
            (ppo("max_mismatch"), "{{run}} limit"),
        ),
        metric("Staleness (updates)", "short", "staleness", "staleness_max"),
        metric("Faults", "short", "faults", "reward_faults"),
        metric("Alarm", "bool", "alarm", limit=1),
        metric("Clip ratio", "percentunit", "clip_ratio", limit=0.3),
        metric("KL of the update", "short", "approx_kl", limit=0.1),
        metric("Explained variance", "percentunit", "explained_variance"),
        metric("Gradient norms", "short", "grad_norm", "critic_grad_norm"),
        metric("Losses", "short", "policy_loss", "value_loss", "kl_loss"),
        metric("KL coefficient", "short", "kl_coef"),
        metric("Off-policy correction", "short", "rollout_kl", "corrected"),
        metric("Learning rates", "sci", "lr", "critic_lr"),
    ]


def ray() -> list[Panel]:
    return [
        panel(
            "Actors alive",
            "Rollout engines, reward workers and learners, by state. For idle engines see where the time goes.",
            "short",
            (f'sum by (Name, State) (ray_actors{{State!="DEAD"}} {PART_OF_RUN})', "{{Name}} {{State}}"),
        ),
        panel(
            "CPUs and GPUs",
            "Resources that Ray has assigned, and free ones. Ray counts requests of actors, not how busy a device is.",
            "short",
            (f'sum by (Name, State) (ray_resources{{Name=~"CPU|GPU"}} {PART_OF_RUN})', "{{Name}} {{State}}"),
        ),
        panel(
            "Object store",
            "Size of Ray's objects by location. SPILLED above 0 means that the store is too small.",
            "bytes",
            (f"sum by (Location) (ray_object_store_memory {PART_OF_RUN})", "{{Location}}"),
        ),
    ]


def scorer_rate(name: str, labels: str = APPLICATION) -> str:
    return f"rate(ray_metaalign_reward_{name}{{{labels}}}[$__rate_interval])"


def scorer_latency(share: float) -> str:
    return f"histogram_quantile({share}, sum by (path, le) ({scorer_rate('request_seconds_bucket')}))"


def scorer() -> list[Panel]:
    rate = scorer_rate
    refused = rate("requests_total", APPLICATION + ',status=~"429|5.."')
    return [
        panel(
            "Requests per second",
            "Requests by path and status. 401: the token is missing or wrong. 413, 422: the rows cannot be scored. "
            "429: rejected, because the queue is full. 5xx: an error in the scorer.",
            "reqps",
            (f"sum by (path, status) ({rate('requests_total')})", "{{path}} {{status}}"),
        ),
        panel(
            "Error rate",
            "Share of the requests that were rejected or failed. Healthy: 0.",
            "percentunit",
            (
                f"sum by (status) ({refused}) / ignoring (status) group_left () sum({rate('requests_total')})",
                "{{status}}",
            ),
            limit=0.01,
        ),
        panel(
            "Latency",
            "Time from a request to its response, with queueing, by path.",
            "s",
            *((scorer_latency(share), f"{{{{path}}}} {share:.0%}") for share in (0.5, 0.95, 0.99)),
        ),
        panel(
            "Rows per second",
            "Rows scored. If it is flat while latency grows, the replicas are saturated.",
            "short",
            (f"sum({rate('rows_total')})", "rows"),
        ),
        panel(
            "Tokens per second",
            "Tokens scored, by replica. Large differences mean that the devices differ.",
            "short",
            (f"sum by (replica) ({rate('tokens_total')})", "{{replica}}"),
        ),
        panel(
            "Rows per batch",
            "Mean rows per forward pass. If it is near 1 under load, let clients send more rows per request.",
            "short",
            (f"sum({rate('rows_total')}) / sum({rate('batch_rows_count')})", "rows"),
        ),
        panel(
            "Utilization",
            "Share of the time in which a replica scores. If all are near 1, add replicas.",
            "percentunit",
            (f"sum by (replica) ({rate('busy_seconds_total')})", "{{replica}}"),
            limit=0.9,
        ),
        panel(
            "Tokens waiting",
            "Tokens that a replica has queued or is scoring. Absent while there are no requests. At 262144, the "
            "default limit, the replica rejects further requests.",
            "short",
            (f"sum by (replica) (ray_metaalign_reward_queue_tokens{{{APPLICATION}}})", "{{replica}}"),
        ),
    ]


def board(uid: str, title: str, variable: str, values: str, rows: dict[str, list[Panel]]) -> dict[str, Any]:
    """Return a dashboard. Each row's panels fill the grid from the left."""
    panels: list[Panel] = []
    top = 0
    for name, row in rows.items():
        heading = {"type": "row", "title": name, "collapsed": False, "panels": []}
        panels.append(heading | {"gridPos": {"x": 0, "y": top, "w": COLUMNS, "h": 1}})
        for place, one in enumerate(row):
            line, column = divmod(place, COLUMNS // WIDTH)
            grid = {"x": column * WIDTH, "y": top + 1 + line * HEIGHT, "w": WIDTH, "h": HEIGHT}
            panels.append(one | {"gridPos": grid})
        top += 1 + HEIGHT * -(-len(row) // (COLUMNS // WIDTH))
    chosen = {
        "type": "query",
        "name": variable,
        "datasource": SOURCE,
        "query": {"query": f"label_values({values}, {variable})", "refId": "values"},
        "refresh": 2,  # when the time range changes
        "multi": True,
        "includeAll": True,
        "current": {"text": ["All"], "value": ["$__all"]},
    }
    return {
        "uid": uid,
        "title": title,
        "tags": ["metaalign-rl"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [{"type": "datasource", "name": "datasource", "query": "prometheus"}, chosen]},
        "panels": [one | {"id": number} for number, one in enumerate(panels, start=1)],
    }


def boards() -> dict[str, dict[str, Any]]:
    """Return the dashboards by file name."""
    training = {"Learning": learning(), "Where the time goes": time(), "Health": health(), "Ray": ray()}
    return {
        "ppo.json": board("metaalign-ppo", "MetaAlign PPO", "run", "ray_metaalign_ppo_samples_total", training),
        "scorer.json": board(
            "metaalign-scorer",
            "MetaAlign scorer",
            "application",
            "ray_metaalign_reward_requests_total",
            {"Scorer": scorer()},
        ),
    }


if __name__ == "__main__":
    for name, made in boards().items():
        (FOLDER / name).write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

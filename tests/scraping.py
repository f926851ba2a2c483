"""What a monitoring system sees: the samples of a /metrics page."""

import httpx
from prometheus_client.parser import text_string_to_metric_families

Samples = dict[str, float]


def scrape(port: int) -> Samples:
    """The samples by their names and labels, such as `doorward_calls_total{code="OK"}`; labels stand by name."""
    page = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False, timeout=20)
    assert page.status_code == 200
    return samples(page.text)


def samples(text: str) -> Samples:
    """Of a page's text."""
    return {
        sample.name + _written(sample.labels): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _written(labels: dict[str, str]) -> str:
    return "{" + ",".join(f'{name}="{labels[name]}"' for name in sorted(labels)) + "}" if labels else ""

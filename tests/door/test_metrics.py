"""The expositions of several models become one that Prometheus can read."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from tinyvllm.door.metrics import merge

ONE = """# HELP a_total Things.
# TYPE a_total counter
a_total{engine="0",model_name="x"} 1.0
# HELP b Seconds.
# TYPE b histogram
b_bucket{le="1.0"} 2.0
b_bucket{le="+Inf"} 3.0
b_count 3.0
b_sum 4.5
"""
OWN = '# HELP b Seconds.\n# TYPE b histogram\nb_bucket{le="+Inf"} 1.0\nb_count 1.0\nb_sum 0.5\n'


def test_each_family_comes_once_and_each_sample_names_its_model() -> None:
    text = merge({"": OWN, "x": ONE, 'y "z"\\': ONE.replace('model_name="x"', 'model_name="y"')})
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert text.count("# TYPE") == len(families) == 2
    assert [sample.labels["model_name"] for sample in families["a"].samples] == ["x", "y"]
    counts = {
        sample.labels.get("model_name"): sample.value for sample in families["b"].samples if "_count" in sample.name
    }
    assert counts == {None: 1.0, "x": 3.0, 'y "z"\\': 3.0}

"""What a report says: goldens of the graph diff, the user's lines, refusals with their place."""

import torch
from expecttest import TestCase

import tvcompile
from tvcompile.select import select
from tvcompile.spec import AttentionSpec, Size

NO_CODEGEN = {"tv.strict": True, "tv.codegen": "none"}


def windowed(q, k, v, pad):
    i = torch.arange(q.shape[2])
    keep = (i[None] <= i[:, None]) & (i[:, None] - i[None] < 4) & pad[:, None, None, :]
    s = q @ k.transpose(-1, -2) / 4
    return s.masked_fill(~keep, torch.finfo(s.dtype).min).softmax(-1) @ v


def wrong_dim(q, k, v):
    return (q @ k.mT).softmax(-2) @ v


def inputs():
    q = torch.randn(2, 4, 8, 16)
    return q, q + 1, q + 2


class Reports(TestCase):
    def setUp(self):
        torch._dynamo.reset()

    def test_diff_of_a_padded_window(self):
        report = tvcompile.explain(windowed, options=NO_CODEGEN)(*inputs(), torch.ones(2, 8, dtype=torch.bool))
        self.assertExpectedInline(
            report.diff(),
            """\
--- written
+++ fused
 l_v_: float32[2, 4, 8, 16] = placeholder
-arange: int64[8] = arange(8, device=device(type='cpu'), pin_memory=False)
-unsqueeze: int64[1, 8] = unsqueeze(arange, 0)
-unsqueeze_1: int64[8, 1] = unsqueeze(arange, 1)
-le: bool[8, 8] = le(unsqueeze, unsqueeze_1)
-sub: int64[8, 8] = sub(unsqueeze_1, unsqueeze)
-lt: bool[8, 8] = lt(sub, 4)
-and_1: bool[8, 8] = __and__(le, lt)
-unsqueeze_4: bool[2, 1, 8] = unsqueeze(l_pad_, 1)
-unsqueeze_5: bool[2, 1, 1, 8] = unsqueeze(unsqueeze_4, 2)
-and_2: bool[2, 1, 8, 8] = __and__(and_1, unsqueeze_5)
-transpose: float32[2, 4, 16, 8] = transpose(l_k_, -1, -2)
-matmul: float32[2, 4, 8, 8] = matmul(l_q_, transpose)
-div: float32[2, 4, 8, 8] = div(matmul, 4)
-bitwise_not: bool[2, 1, 8, 8] = bitwise_not(and_2)
-masked_fill: float32[2, 4, 8, 8] = masked_fill(div, bitwise_not, -3.4028234663852886e+38)
-softmax: float32[2, 4, 8, 8] = softmax(masked_fill, -1)
-matmul_1: float32[2, 4, 8, 16] = matmul(softmax, l_v_)
-return [matmul_1]
+attention_default: (float32[2, 4, 8, 16], float32[2, 4, 8], float32[0]) = tv.attention(l_q_, l_k_, l_v_, [l_pad_], [], 'scale=0.25; keep = kv <= q & q - kv < 4 & pad[b, kv]; empty=mean_cut', None)
+getitem: float32[2, 4, 8, 16] = getitem(attention_default, 0)
+clone_default: float32[2, 4, 8, 16] = clone(getitem, memory_format=torch.contiguous_format)
+return [clone_default]""",
        )

    def test_no_square_node_is_left(self):
        report = tvcompile.explain(windowed, options=NO_CODEGEN)(*inputs(), torch.ones(2, 8, dtype=torch.bool))
        (gm,) = report.graph_modules
        shapes = [n.meta["val"].shape for n in gm.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        self.assertFalse([s for s in shapes if list(s[-2:]) == [8, 8]])

    def test_site_names_the_line_of_the_user(self):
        report = tvcompile.explain(windowed, options=NO_CODEGEN)(*inputs(), torch.ones(2, 8, dtype=torch.bool))
        (site,) = report.sites
        self.assertExpectedInline(site.spec, """scale=0.25; keep = kv <= q & q - kv < 4 & pad[b, kv]; empty=mean_cut""")
        self.assertIn("test_report.py", site.where)
        self.assertIn("masked_fill", site.where)
        self.assertIn("GFLOP", site.cost)

    def test_refusal_names_reason_and_line(self):
        report = tvcompile.explain(wrong_dim, options=NO_CODEGEN)(*inputs())
        (refusal,) = report.refusals
        self.assertEqual(report.sites, [])
        self.assertExpectedInline(
            refusal.reason,
            """the weights are a softmax over another dim of the scores, not a softmax over the summed position""",
        )
        self.assertIn("test_report.py", refusal.where)
        self.assertIn("softmax(-2)", refusal.where)
        self.assertEqual(refusal.anchor, "aten.softmax.int")

    def test_the_whole_report_prints_site_and_refusal(self):
        def both(q, k, v):
            return wrong_dim(q, k, v) + (q @ k.mT).softmax(-1) @ v

        text = str(tvcompile.explain(both, options=NO_CODEGEN)(*inputs()))
        self.assertIn("1 graphs, 1 sites fused, 1 left", text)
        self.assertIn("scale=1", text)
        self.assertIn("left as it was: aten.softmax.int", text)

    def test_collect_sees_only_its_own_block(self):
        with tvcompile.collect() as first:
            torch.compile(wrong_dim, backend="tv", options=NO_CODEGEN)(*inputs())
        torch._dynamo.reset()
        with tvcompile.collect() as second:
            pass
        self.assertEqual((first.graphs, second.graphs), (1, 0))


def test_where_sizes_are_not_known_every_kernel_they_may_lead_to_is_named():
    spec = AttentionSpec.parse("scale=0.5; keep = kv <= q; dropout=0.1")
    assert select(spec, torch.device("cpu"), torch.float32, Size()) == ("cpu.products", "")
    spec = AttentionSpec.parse("scale=0.5; keep = kv <= q & pad[b, kv]")
    assert select(spec, torch.device("cpu"), torch.float32, Size()) == ("cpu.flash or cpu.products", "")
    assert select(spec, torch.device("cpu"), torch.float32, Size(1 << 30, 1 << 14)) == ("cpu.products", "")

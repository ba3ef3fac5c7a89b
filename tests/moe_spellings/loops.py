"""A loop over the experts, each on its own tokens."""

import torch
import torch.nn.functional as F

from tests.moe_spellings.base import ACTIVATIONS, B, Block, S, moe


@moe()
@moe(own=True)
@moe(order="oi", router="renormalised")
@moe(kind="gpt_oss", layout="interleave", bias=True, router="topk_softmax")
@moe(kind="gelu", own=True, bias=True)
@moe(layout="separate", router="grouped", order="oi")
@moe(count=9, top=8)
class WhereIndexAdd(Block):
    """Mixtral before version 5: one_hot, permute, torch.where, index_add_."""

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, num_classes=self.count).permute(2, 1, 0)
        for e in range(self.count):
            k, token = torch.where(mask[e])
            rows = self.expert(x[None, token].reshape(-1, x.shape[-1]), e) * w[token, k, None]
            out.index_add_(0, token, rows.to(x.dtype))
        return out


@moe(bias=True)
@moe(bias=True, kind="gelu", router="log_probabilities")
class Addmm(WhereIndexAdd):
    """Products that add their bias, as torch.addmm does."""

    def linear(self, x, name: str, e: int):
        return torch.addmm(getattr(self, f"b_{name}")[e], x, getattr(self, f"w_{name}")[e])


@moe()
@moe(own=True, kind="geglu")
@moe(kind="relu", order="oi", bias=True)
@moe(top=1, router="top1")
class WhereIndexPlus(Block):
    """mistral-inference: results[token] += w * expert(x[token])."""

    def experts(self, x, ids, w):
        results = torch.zeros_like(x)
        for e in range(self.count):
            token, k = torch.where(ids == e)
            results[token] += w[token, k, None] * self.expert(x[token], e)
        return results


@moe()
@moe(own=True)
@moe(kind="silu", router="sorted_softmax")
class BooleanPlus(Block):
    """out[mask] += ..., the weight summed over the choices."""

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            hit = ids == e
            mask = hit.any(dim=-1)
            coefficient = (w * hit).sum(dim=-1)
            out[mask] += self.expert(x[mask], e) * coefficient[mask].unsqueeze(-1)
        return out


@moe()
@moe(own=True, kind="relu", bias=True)
class MaskedSequences(Block):
    """Masks over [B,S] choose rows of the flat tokens, and the places where they are added."""

    three = True

    def experts(self, x, ids, w):
        out, matrix = torch.zeros_like(x), torch.zeros(*x.shape[:2], self.count, dtype=w.dtype).scatter(-1, ids, w)
        flat, weights = x.view(-1, x.shape[-1]), matrix.view(-1, self.count)
        for e in range(self.count):
            mask = (ids == e).any(dim=-1)
            y = self.expert(flat[mask.view(-1)], e) * weights[mask.view(-1), e].unsqueeze(1)
            out[mask] += y.squeeze(1).to(out.dtype)
        return out


@moe()
@moe(own=True, kind="relu2")
@moe(order="oi", layout="separate", bias=True)
@moe(kind="power")
@moe(kind="powers", bias=True)
@moe(kind="selu")
@moe(kind="celu")
@moe(kind="hardswish", bias=True)
@moe(kind="softshrink")
@moe(kind="hardshrink")
@moe(kind="threshold")
class ChoiceByChoice(Block):
    """Two loops: over choices and experts."""

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for k in range(self.top):
            for e in range(self.count):
                mask = ids[:, k] == e
                out[mask] += w[mask, k].unsqueeze(-1) * self.expert(x[mask], e)
        return out


@moe()
@moe(own=True, router="sigmoid_topk")
@moe(kind="gelu", bias=True)
class AssignedPairs(Block):
    """DeepSeek's training code: pairs in a buffer, weighed and added up at the end."""

    def experts(self, x, ids, w):
        rows, flat = x.repeat_interleave(self.top, dim=0), ids.view(-1)
        y = torch.empty_like(rows)
        for e in range(self.count):
            y[flat == e] = self.expert(rows[flat == e], e)
        return (y.view(*w.shape, -1) * w.unsqueeze(-1)).sum(dim=1)


@moe()
@moe(own=True, bias=True)
class NonzeroIndexPut(Block):
    """nonzero(as_tuple=True), index_select, index_put_ that accumulates."""

    def experts(self, x, ids, w):
        out = x.new_zeros(x.shape)
        for e in range(self.count):
            token, k = (ids == e).nonzero(as_tuple=True)
            y = self.expert(x.index_select(0, token), e) * w[token, k].unsqueeze(1)
            out.index_put_((token,), y, accumulate=True)
        return out


@moe()
@moe(kind="geglu_tanh", layout="interleave", order="oi")
class NonzeroScatterAdd(Block):
    """Positions in the flat pairs; scatter_add_ with expanded indices."""

    def experts(self, x, ids, w):
        out, flat, flat_w = torch.zeros_like(x), ids.flatten(), w.flatten()
        for e in range(self.count):
            pair = (flat == e).nonzero().squeeze(-1)
            token = torch.div(pair, self.top, rounding_mode="floor")
            y = self.expert(x[token], e) * flat_w[pair][:, None]
            out.scatter_add_(0, token[:, None].expand(-1, x.shape[-1]), y)
        return out


@moe()
@moe(own=True, kind="relu")
class FunctionalIndexAdd(Block):
    """Nothing in place."""

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            token, k = torch.nonzero(ids == e).unbind(1)
            out = out.index_add(0, token, self.expert(x[token], e) * w[token, k, None])
        return out


@moe()
class GatheredAndAddedOnce(Block):
    """All experts' rows in one list; one index_add."""

    def experts(self, x, ids, w):
        rows, tokens = [], []
        for e in range(self.count):
            token, k = torch.where(ids == e)
            rows.append(self.expert(x[token], e) * w[token, k, None])
            tokens.append(token)
        return torch.zeros_like(x).index_add_(0, torch.cat(tokens), torch.cat(rows))


@moe(router="top1", kind="relu")
@moe(router="top1_argmax", own=True)
class Switch(Block):
    """Switch Transformers: top-1, assigned, then multiplied by the probability."""

    top = 1

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            token = (ids.squeeze(-1) == e).nonzero().squeeze(-1)
            out[token] = self.expert(x[token], e)
        return out * w


class Intervals(Block):
    """The expert is the interval that a number of the token is in."""

    top, router = 1, "top1"

    def numbers(self, x):
        return self.route(x)[1][:, 0] * 250 + 100  # up to 850

    def ids(self, x):
        return (self.numbers(x) * self.count // 800).clamp(max=self.count - 1)

    def coefficients(self, x):
        return F.one_hot(self.ids(x), self.count).to(x.dtype)

    def experts(self, x, ids, w):
        ids, out = self.ids(x), torch.zeros_like(x)
        for e in range(self.count):
            mask = ids == e
            out[mask] = self.expert(x[mask], e)
        return out


@moe()
@moe(own=True, kind="gelu")
class IntervalsClamped(Intervals):
    pass


@moe(kind="relu")
class IntervalsDivided(Intervals):
    def ids(self, x):
        return torch.div(self.numbers(x), 250, rounding_mode="floor")


@moe(router="top1", kind="gelu")
class SwitchByOneHot(Switch):
    """Results are weighted where they are put, by the one probability that a one-hot leaves."""

    def experts(self, x, ids, w):
        out, probabilities = torch.zeros_like(x), self.gate(x).softmax(-1)
        mine = F.one_hot(ids.squeeze(-1), self.count).to(x.dtype)
        for e in range(self.count):
            token = (ids.squeeze(-1) == e).nonzero().squeeze(-1)
            out[token] = self.expert(x[token], e) * (probabilities * mine).sum(1)[token, None]
        return out


@moe(router="top1")
class SwitchByBoolean(Block):
    top = 1

    def experts(self, x, ids, w):
        ids, out = ids[:, 0], torch.zeros_like(x)
        for e in range(self.count):
            mask = ids == e
            out[mask] = self.expert(x[mask], e) * w[mask]
        return out


@moe(three=True)
@moe(three=True, own=True, kind="geglu")
class ThreeDims(Block):
    """x [B,S,H] and ids [B,S,K] throughout."""

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            b, s, k = torch.where(ids == e)
            out[b, s] += w[b, s, k].unsqueeze(-1) * self.expert(x[b, s], e)
        return out


@moe(three=True)
@moe(three=True, kind="gelu", bias=True, router="top1", top=1)
class ThreeDimsBoolean(Block):
    def experts(self, x, ids, w):
        out, flat, flat_out = torch.zeros_like(x), x.view(-1, x.shape[-1]), None
        flat_out = out.view(-1, x.shape[-1])
        for e in range(self.count):
            mask = (ids == e).any(-1).view(-1)
            weight = torch.where(ids == e, w, torch.zeros_like(w)).sum(-1).view(-1, 1)
            flat_out[mask] = flat_out[mask] + weight[mask] * self.expert(flat[mask], e)
        return out


@moe(kind="relu", bias=True)
@moe(layout="separate", order="oi")
class MakeMoe(Block):
    """A tutorial's: softmax over scattered logits, masks [B,S], flat masks for the rows."""

    router, three = "topk_softmax", True

    def forward(self, x):
        logits = self.gate(x)
        best, ids = logits.topk(self.top, dim=-1)
        gating = torch.full_like(logits, float("-inf")).scatter(-1, ids, best).softmax(dim=-1)
        out = torch.zeros_like(x)
        flat, flat_gating = x.view(-1, x.size(-1)), gating.view(-1, gating.size(-1))
        for e in range(self.count):
            mask = (ids == e).any(dim=-1)
            rows = mask.view(-1)
            scores = flat_gating[rows, e].unsqueeze(1)
            out[mask] += (self.expert(flat[rows], e) * scores).squeeze(1)
        return out


@moe(router="topk_softmax", three=True)
@moe(three=True, kind="gelu", bias=True)
class IndexAddThroughAView(Block):
    """Results added to a flat view of what is returned."""

    def experts(self, x, ids, w):
        out, flat = torch.zeros_like(x), x.view(-1, x.shape[-1])
        flat_out, ids, w = out.view(-1, x.shape[-1]), ids.flatten(0, 1), w.flatten(0, 1)
        for e in range(self.count):
            token, k = torch.where(ids == e)
            flat_out.index_add_(0, token, self.expert(flat[token], e) * w[token, k, None])
        return out


@moe(router="top1", top=1, kind="relu", three=True)
@moe(router="top1", top=1, three=True, order="oi", layout="separate")
class SwitchLoop(Block):
    """Switch of transformers: a mask [B,S,E] that drops what exceeds an expert's capacity in a sequence."""

    def kept(self, ids):
        mask = F.one_hot(ids.squeeze(-1), self.count)
        return mask * (torch.cumsum(mask, dim=-2) <= 2)

    def coefficients(self, x):
        w, ids = self.route(x.view(B, S, -1))
        w = w * (self.kept(ids).sum(-1, keepdim=True) > 0)
        return torch.zeros(x.shape[0], self.count, dtype=w.dtype).scatter_add(1, ids.flatten(0, 1), w.flatten(0, 1))

    def experts(self, x, ids, w):
        mask, out = self.kept(ids).bool(), torch.zeros_like(x)
        for e in range(self.count):
            out[mask[:, :, e]] = self.expert(x[mask[:, :, e]], e)
        return out * w


@moe(kind="gelu", top=1)
@moe(order="oi", layout="separate", top=1)
class WeighedByItsColumn(Block):
    """Top-1: the weight is read from the probabilities at the expert's own column."""

    def route(self, x):
        return self.gate(x).softmax(-1).max(-1, keepdim=True)

    def experts(self, x, ids, w):
        out, probabilities = torch.zeros_like(x), self.gate(x).softmax(-1)
        for e in range(self.count):
            (token,) = torch.where(ids[:, 0] == e)
            out.index_add_(0, token, self.expert(x[token], e) * probabilities[token, e, None])
        return out


@moe()
@moe(kind="relu2", bias=True)
class SortedRowsByMask(Block):
    """Pairs in the order of their experts, each expert's by a mask over them."""

    def experts(self, x, ids, w):
        order = ids.flatten().argsort()
        token, expert, weight = order // self.top, ids.flatten()[order], w.flatten()[order]
        rows, y = x[token], torch.zeros(order.shape[0], x.shape[-1], dtype=x.dtype)
        for e in range(self.count):
            y[expert == e] = self.expert(rows[expert == e], e)
        return torch.zeros_like(x).index_add_(0, token, y * weight[:, None])


@moe()
@moe(kind="gelu", bias=True, router="top1", top=1)
class AddedToTheTokens(Block):
    """The residual inside: results are added to a copy of the tokens, flat where x is not."""

    def experts(self, x, ids, w):
        out = x.clone()
        for k in range(self.top):
            for e in range(self.count):
                mask = ids[:, k] == e
                out[mask] += self.expert(x[mask], e) * w[mask, k, None]
        return out

    def reference(self, x):
        return super().reference(x) + x


class PairsOneByOne(Block):
    """Results are put where their pairs of token and choice are."""

    def put(self, y, hits, rows):
        raise NotImplementedError

    def experts(self, x, ids, w):
        flat, rows = ids.view(-1), x.repeat_interleave(self.top, dim=0)
        y = torch.zeros_like(rows)
        for e in range(self.count):
            y = self.put(y, flat == e, self.expert(rows[flat == e], e))
        return (y.view(-1, self.top, x.shape[-1]) * w.unsqueeze(-1)).sum(1)


@moe()
@moe(own=True, kind="relu", bias=True)
class MaskedScatter(PairsOneByOne):
    def put(self, y, hits, rows):
        return y.masked_scatter(hits.unsqueeze(1).expand_as(y), rows)


@moe(order="oi")
class IndexCopy(PairsOneByOne):
    def put(self, y, hits, rows):
        return y.index_copy(0, hits.nonzero().squeeze(-1), rows)


@moe()
@moe(own=True)
@moe(kind="gelu", order="oi")
class WeighedInside(Block):
    """Megatron: the weight multiplies what is activated, before the last projection."""

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            token, k = torch.where(ids == e)
            out.index_add_(0, token, self.weighed(x[token], e, w[token, k, None]).to(x.dtype))
        return out

    def weighed(self, x, e, w):
        if self.own:
            one = self.list[e]
            return one.w_down(F.silu(one.w_gate(x)) * one.w_up(x) * w.to(x.dtype))
        return self.linear(self.activate(self.linear(x, "up", e)) * w.to(x.dtype), "down", e)


@moe(kind="relu")
@moe(own=True)
class AnExpertThatSkips(WhereIndexPlus):
    """One class more than there are experts, which computes nothing."""

    def route(self, x):
        logits = self.gate(x)
        return torch.cat([logits, logits[..., :1] / 2], -1).softmax(-1).topk(self.top, dim=-1)

    def of_all(self, x):
        w, ids = self.route(x)
        return torch.zeros(x.shape[0], self.count + 1, dtype=w.dtype).scatter_add(1, ids, w)

    def coefficients(self, x):
        return self.of_all(x)[:, :-1]


@moe(kind="relu", skipped=0)
@moe(own=True, bias=True, skipped=2)
@moe(own=True, skipped=0)
class AnyExpertSkips(Block):
    """The class that computes nothing comes first, or between the experts."""

    skipped = 0

    def route(self, x):
        logits = self.gate(x)
        logits = [logits[..., : self.skipped], logits[..., :1] / 2, logits[..., self.skipped :]]
        return torch.cat(logits, -1).softmax(-1).topk(self.top, dim=-1)

    def coefficients(self, x):
        w, ids = self.route(x)
        found = torch.zeros(x.shape[0], self.count + 1, dtype=w.dtype).scatter_add(1, ids, w)
        return torch.cat([found[:, : self.skipped], found[:, self.skipped + 1 :]], 1)

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            token, k = torch.where(ids == (e if e < self.skipped else e + 1))
            out = out.index_add(0, token, w[token, k, None] * self.expert(x[token], e))
        return out


@moe(kind="relu")
@moe(own=True, bias=True)
class AnExpertThatCopies(AnExpertThatSkips):
    """LongCat's zero experts: what chose them stays as it is."""

    def experts(self, x, ids, w):
        out = x * (w * (ids >= self.count)).sum(-1, keepdim=True)
        for e in range(self.count):
            token, k = torch.where(ids == e)
            out = out.index_add(0, token, w[token, k, None] * self.expert(x[token], e))
        return out

    def reference(self, x):
        return super().reference(x) + x * self.of_all(x.reshape(-1, x.shape[-1]))[:, -1].reshape(*x.shape[:-1], 1)


@moe(kind="relu")
@moe(own=True, bias=True)
class Negated(Block):
    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            token, k = torch.where(ids == e)
            out = out.index_add(0, token, -(w[token, k, None] * self.expert(x[token], e)))
        return out * -1.0


@moe(own=True, kind="relu")
@moe(bias=True)
class Subtracted(Block):
    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            out = torch.sub(out, self.expert(x, e) * (w * (ids == e)).sum(-1, keepdim=True), alpha=2)
        return out / -2


@moe(kind="relu")
@moe(own=True, kind="gelu")
class IdleCasts(Block):
    """Casts to the dtype that is there, also where the weight is on its way through the last projection."""

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            token, k = torch.where(ids == e)
            if self.own:
                h = ACTIVATIONS[self.kind](None, self.list[e].w_up(x[token])) * w[token, k, None].to(x.dtype)
                y = self.list[e].w_down(h.to(x.dtype))
            else:
                h = self.activate(self.linear(x[token].to(x.dtype), "up", e)) * w[token, k, None].to(x.dtype)
                y = self.linear(h.to(x.dtype), "down", e)
            out = out.index_add(0, token, y.to(out.dtype))
        return out

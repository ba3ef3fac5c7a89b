"""tvcompile: attention proven and fused by `torch.compile(model, backend="tv")`."""

from .kernels import attention as _attention  # noqa: F401  registers the op
from .report import Report, collect, explain
from .spec import AttentionSpec, Refusal, Site

__version__ = "0.1.0"
__all__ = ["AttentionSpec", "Refusal", "Report", "Site", "collect", "explain"]

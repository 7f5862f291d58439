"""The tuner: PEFT calls it to add adapters to a model, and it holds their stacks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTuner, replicate_layers
from torch import Tensor, nn
from typing_extensions import Self

from tcurlora_ext.adapter.distributed.dtensor import refuse_sharded
from tcurlora_ext.adapter.files.lora import LoraSource
from tcurlora_ext.adapter.layer.parameter import HeldParameter, put_parameter
from tcurlora_ext.adapter.model.structure import refuse_adapted
from tcurlora_ext.adapter.model.support import is_conv1d, is_convolution
from tcurlora_ext.adapter.model.targets import placed
from tcurlora_ext.adapter.options import WEIGHTS
from tcurlora_ext.adapter.stack import TCURStack
from tcurlora_ext.adapter.stack.slices import LayerSlices
from tcurlora_ext.adapter.subspace import Subspace

from .config import TcurLoraConfig
from .directions import new_subspace, require_factors, with_learned, with_subspace
from .effect import note_call, warn_without_effect
from .experts import adapt_parameters
from .indices import with_factors, without_factors
from .layer import TcurLoraConv, TcurLoraLinear
from .lora import lora_source
from .mixed import rows_for_adapters
from .quantised import backend_of
from .sharing import share_factors
from .stacks import new_stack
from .targets import (
    base_of,
    check_modules_to_save,
    find_groups,
    name_defaults,
    parameter_targets,
    rank_pattern,
    stack_configs,
)
from .weighted import weighted_sum


class TcurLoraModel(BaseTuner):
    """A model with t-CUR adapters. ``get_peft_model`` and ``PeftModel.from_pretrained`` create it.

    Attributes:
        tcurlora_core: Adapter -> name of a stack -> :class:`tcurlora_ext.TCURStack`. Stacks are registered here once;
            the layers use them by reference.
        called: Whether the model has been called through a PeftModel with an adapter enabled.
        loaded: The adapters whose values were loaded, or computed from those of others.
        subspaces: Adapter -> its subspace, where its factors are learned; an adapter whose checkpoint is still to bring
            it is not there.
    """

    prefix = "tcurlora_"
    uses_shared_state = True
    tuner_layer_cls = TcurLoraLinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # PEFT's; default_names() stands in for it

    tcurlora_core: nn.ModuleDict
    called: bool
    loaded: set[str]
    subspaces: dict[str, Subspace]

    def stacks(self, adapter_name: str) -> dict[str, TCURStack]:
        """An adapter's stacks by name.

        Args:
            adapter_name: The adapter.
        """
        return dict(cast("nn.ModuleDict", self.tcurlora_core[adapter_name]).items())  # type: ignore[arg-type]

    # -- adding an adapter --------------------------------------------------------------------------------------------

    def _pre_injection_hook(self, model: nn.Module, config: TcurLoraConfig, adapter_name: str) -> None:
        self.tcurlora_core = nn.ModuleDict()
        self.called, self.loaded, self.subspaces = False, set(), {}
        self.layer_replication, self._replicated = config.layer_replication, False

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, low_cpu_mem_usage: bool = False, **kwargs: Any
    ) -> None:
        """As in PEFT. After an error the tuner has no stack of this adapter.

        Args:
            model: The model to which the adapter is added.
            adapter_name: The adapter.
            *args: Passed on to PEFT.
            low_cpu_mem_usage: Create the stacks on the meta device; their values are loaded later.
            **kwargs: Passed on to PEFT.
        """
        # PEFT restores requires_grad of earlier adapters, but only finds parameters in the layers, not those here.
        before = [(core, core.requires_grad) for core in self.tcurlora_core.parameters()]
        self._injected = (adapter_name, low_cpu_mem_usage)
        self._slices: dict[str, LayerSlices] = {}
        try:
            super().inject_adapter(model, adapter_name, *args, low_cpu_mem_usage=low_cpu_mem_usage, **kwargs)
        except Exception:
            if adapter_name in self.tcurlora_core:
                del self.tcurlora_core[adapter_name]
            self.subspaces.pop(adapter_name, None)
            raise
        finally:
            del self._injected, self._slices
        for core, requires_grad in before:
            core.requires_grad_(requires_grad)

    def _prepare_adapter_config(self, peft_config: TcurLoraConfig, model_config: dict[str, Any]) -> TcurLoraConfig:
        name_defaults(self.model, peft_config)
        return peft_config

    def _prepare_model(self, peft_config: TcurLoraConfig, model: nn.Module) -> None:
        """Build the adapter's stacks before any layer is replaced: a stack needs all its layers at once."""
        adapter_name, on_meta = self._injected
        refuse_sharded(model, "add adapters before it is sharded")
        refuse_adapted(model)
        check_modules_to_save(model, peft_config)
        self._replicate_layers(peft_config, model)
        groups = find_groups(model, peft_config)
        configs = stack_configs(groups, peft_config)
        subspace = new_subspace(peft_config, self.subspaces)
        stacks = {name: new_stack(name, groups[name], configs[name], peft_config, on_meta, subspace) for name in groups}
        if subspace is not None:
            self.subspaces[adapter_name] = subspace
        self.share_with_the_others(stacks)
        for name, members in groups.items():
            for target, first in placed(members):
                self._slices[target.name] = LayerSlices(stacks[name], first, target.slices)
        self.tcurlora_core[adapter_name] = nn.ModuleDict(stacks)
        if peft_config.budget is not None:
            # With other base weights the budget may give other ranks, which a checkpoint of this adapter would not fit.
            peft_config.rank_pattern = rank_pattern(groups, {name: stack.rank for name, stack in stacks.items()})
            peft_config.budget = None

    def _replicate_layers(self, config: TcurLoraConfig, model: nn.Module) -> None:
        """Replicate layers for the first adapter. Raises ValueError where a later adapter has another list."""
        if config.layer_replication != self.layer_replication:
            raise ValueError(
                f"layer_replication is {config.layer_replication}, expected {self.layer_replication} as for the "
                "model's first adapter: all adapters have the same layers"
            )
        if self.layer_replication and not self._replicated:
            # Raises for targets that do not fit, before anything is changed.
            stack_configs(find_groups(model, config), config)
            replicate_layers(model, self.layer_replication)
            self._replicated = True

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        if self.layer_replication:
            raise ValueError("cannot merge: replicated layers share one weight, and each has a dW of its own")
        warn_without_effect(self, self.tcurlora_core)

    def share_with_the_others(self, stacks: dict[str, TCURStack]) -> None:
        """Let an adapter's stacks use C and R of other adapters where they are equal.

        Args:
            stacks: The adapter's stacks, by name.
        """
        others = [stack for name in self.tcurlora_core for stack in self.stacks(name).values()]
        for stack in stacks.values():
            share_factors(stack, [other for other in others if other is not stack])

    def _create_and_replace(
        self,
        peft_config: TcurLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        slices = self._slices[current_key]
        if isinstance(target, TcurLoraLinear):
            target.update_layer(adapter_name, slices, peft_config.inference_mode)
            return
        _note_layout(peft_config, target)
        backend = backend_of(base_of(target), self.model)
        kind = TcurLoraConv if is_convolution(base_of(target)) else TcurLoraLinear
        layer = kind(target, adapter_name, slices, peft_config.inference_mode, backend)
        self._replace_module(parent, target_name, layer, target)

    def _inject_parameters(
        self, peft_config: TcurLoraConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        targets = parameter_targets(model, peft_config)
        adapt_parameters(model, targets, adapter_name, self._slices, peft_config.inference_mode)
        return [target.name for target in targets]

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, HeldParameter):
            put_parameter(parent, child_name, new_module)
            return
        # PEFT's method also assigns weight and bias. The layers here find them in their base layer, and a layer with
        # merged trainable tokens would refuse the assignment.
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast cores to the base's dtype unless ``autocast_adapter_dtype``, for which they are float32 already.

        PEFT calls it when an adapter was added, and again when its values are loaded: tensors that were assigned are
        shared then.
        """
        self.share_with_the_others(self.stacks(adapter_name))
        if not autocast_adapter_dtype:
            for stack in self.stacks(adapter_name).values():
                stack.core.data = stack.core.data.to(stack.row.dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT; the adapter's stacks are deleted too.

        Args:
            adapter_name: The adapter.
        """
        super().delete_adapter(adapter_name)
        self.loaded.discard(adapter_name)
        self.subspaces.pop(adapter_name, None)
        del self.tcurlora_core[adapter_name]

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add an adapter whose dW is exactly the weighted sum of the dW of other adapters.

        Two stacks of different adapters must have either all layers in common or none. The new adapter has the first
        adapter's scale and options.

        Args:
            adapters: Names of the adapters to sum.
            weights: The weight of each of them.
            adapter_name: The new adapter.
            combination_type: ``"linear"``: the weighted sum of the cores, for adapters that chose the same columns and
                rows. ``"cat"``, for any choice: C = [C_1 C_2 ...], R = [R_1; R_2; ...] and a block-diagonal core; the
                rank is the sum of the ranks.

        Raises:
            ValueError: The adapters have no such sum, a name is unknown or taken, or the rank becomes too large;
                nothing is changed.
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter {adapter_name} exists, expected a new name")
        unknown = next((name for name in adapters if name not in self.peft_config), None)
        if unknown is not None:
            raise ValueError(f"adapter {unknown} does not exist, expected some of {', '.join(self.peft_config)}")
        config, stacks = weighted_sum(
            self.model,
            adapters,
            weights,
            self.peft_config,
            {name: self.stacks(name) for name in adapters},
            combination_type,
        )
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name, low_cpu_mem_usage=True)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        state = {
            f"tcurlora_core.{adapter_name}.{name}.{kind}": value
            for name, values in stacks.items()
            for kind, value in values.items()
        }
        self.load_state_dict(state, strict=False, assign=True)
        self.share_with_the_others(self.stacks(adapter_name))
        self.loaded.add(adapter_name)

    # For ensure_weight_tying: PEFT defines this method for LoRA only, but nothing in it is specific to LoRA.
    _add_modules_to_save_to_tie = LoraModel._add_modules_to_save_to_tie

    # -- mixed batches ------------------------------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        adapter_names = kwargs.pop("adapter_names", None)
        if len(self.subspaces) < len(self.peft_config):
            for name in dict.fromkeys(adapter_names or self.active_adapters):
                if name in self.peft_config:
                    require_factors(self.peft_config[name], name, self.subspaces.get(name))
        mixed = adapter_names is not None
        with rows_for_adapters(self, adapter_names, kwargs.get("num_beams")) if mixed else nullcontext():
            yield
        note_call(self)

    def lora_source(self, adapter_name: str | None = None) -> LoraSource:
        """What :func:`tcurlora_ext.to_lora` makes a LoRA adapter from.

        Args:
            adapter_name: Which adapter; None: the active one.

        Raises:
            ValueError: As :func:`tcurlora_ext.to_lora`.
        """
        return lora_source(self, adapter_name)

    # -- saving and loading -------------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: TcurLoraConfig, adapter_name: str, *rest: Any, **named: Any
    ) -> dict[str, Tensor]:
        state = super()._get_adapter_state_dict(model, config, adapter_name, *rest, **named)
        tuner = cls._tuner_in(model)
        warn_without_effect(tuner, [adapter_name], state)
        if config.factors != WEIGHTS:
            require_factors(config, adapter_name, tuner.subspaces.get(adapter_name))
            return with_subspace(tuner, adapter_name, state, config.save_projection is not False)
        if config.save_projection:
            return state
        always = config.save_projection is False
        return without_factors(model, tuner.stacks(adapter_name), adapter_name, state, always)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: TcurLoraConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        state = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        tuner = cls._tuner_in(model)
        tuner.loaded.add(adapter_name)
        if config.factors != WEIGHTS:
            return with_learned(tuner, adapter_name, state)
        return with_factors(model, tuner.stacks(adapter_name), adapter_name, state)

    @classmethod
    def _tuner_in(cls, model: nn.Module) -> Self:
        return next(module for module in model.modules() if isinstance(module, cls))

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """``tcurlora_core.<adapter>.<stack>.core`` -> ``tcurlora_core.<stack>``, ``...row`` -> ``tcurlora_row...``."""
        head, found, tail = key.partition(f"tcurlora_core.{adapter_name}.")
        if not found:
            return super()._remove_adapter_name_from_key(key, adapter_name)
        stack, kind = tail.split(".")
        return f"{head}tcurlora_{kind}.{stack}"


def _note_layout(config: TcurLoraConfig, target: nn.Module) -> None:
    """Set ``fan_in_fan_out`` by the layer's type, with the warning that PEFT's other methods give."""
    base = base_of(target)
    transposed = is_conv1d(base)
    if config.fan_in_fan_out != transposed:
        warnings.warn(
            f"fan_in_fan_out is set to {config.fan_in_fan_out} but the target module is `{type(base).__name__}`. "
            f"Setting fan_in_fan_out to {transposed}.",
            stacklevel=2,
        )
        config.fan_in_fan_out = transposed

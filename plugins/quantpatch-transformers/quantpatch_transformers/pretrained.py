"""``save_pretrained`` and ``from_pretrained`` of quantized models, by transformers' registry of quantizers.

A checkpoint has the weights and, beside them, the ranges. How the layers are quantized is in the metadata of
its safetensors files, and ``config.json`` names quantpatch as the method. transformers loads the weights.
Layers and quantizers are restored before, on the meta device, and ranges after: none is cast to a dtype.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import quantpatch as qp
from quantpatch.errors import CheckpointError, ConversionError, QuantPatchWarning
from quantpatch.export import StructurePlan, describe
from quantpatch.layers import RANGE_KEY, ZERO_POINT_KEY, QuantizedLayer, named_quantizers
from quantpatch.quantize import quantize_operations_early
from quantpatch.recipes import active_recipe
from quantpatch_transformers.checkpoint_keys import Checkpoint, aliased, names_in
from quantpatch_transformers.tied_weights import leave_ranges_untied

__all__ = ["METHOD", "QuantPatchConfig", "QuantPatchQuantizer", "get_hf_quantizer", "make_savable"]

#: Name of the method in ``config.json`` and in transformers' registry.
METHOD = "quantpatch"
# Key of the description in the metadata of safetensors files, as in those of qp.save.
_METADATA = "quantpatch"


class QuantPatchConfig(QuantizationConfigMixin):
    """How ``from_pretrained`` quantizes a float checkpoint, or that a checkpoint is quantized already.

    ::

        model = AutoModelForCausalLM.from_pretrained(
            path, quantization_config=QuantPatchConfig(recipe="int8", rules={"lm_head": None})
        )

    Args:
        recipe: As in ``quantpatch.convert``, like the next three. None in the configuration of a saved model,
            whose files describe each of its layers.
        skip: See there.
        include: See there.
        plugins: See there.
        rules: As in ``quantpatch.configure``: what names match, and a recipe or None for float.
        operations: As in ``quantpatch.convert``: ``"products"`` quantizes attention's products as well.
        **kwargs: What ``config.json`` has beside these: the method, and quantpatch's version.
    """

    def __init__(
        self,
        recipe: str | qp.Recipe | None = "int8",
        skip: Iterable[str | type] = (),
        include: Iterable[str | type] = (),
        plugins: Iterable[str] | None = None,
        rules: Mapping[Any, Any] | None = None,
        operations: Any = None,
        **kwargs: Any,
    ) -> None:
        unknown = sorted(kwargs.keys() - {"quant_method", "quantpatch_version"})
        if unknown:
            raise TypeError(
                f"QuantPatchConfig has no {unknown[0]!r}; it takes recipe, skip, include, plugins, rules and "
                f"operations"
            )
        self.quant_method = METHOD  # type: ignore[assignment]
        self.recipe = recipe
        self.skip = (skip,) if isinstance(skip, (str, type)) else tuple(skip)
        self.include = (include,) if isinstance(include, (str, type)) else tuple(include)
        self.plugins = None if plugins is None else tuple(plugins)
        self.rules = dict(rules or {})
        self.operations = operations
        self.quantpatch_version = kwargs.get("quantpatch_version", qp.__version__)

    def to_dict(self) -> dict[str, Any]:
        """What goes into ``config.json``: names, where there are objects."""

        def named(value: Any) -> Any:
            if isinstance(value, qp.Recipe):
                return value.name
            if isinstance(value, type):
                return f"{value.__module__}.{value.__qualname__}"
            if isinstance(value, Mapping):
                return {named(key): named(each) for key, each in value.items()}
            if isinstance(value, (list, tuple, set, frozenset)):
                return [named(each) for each in value]
            return value if value is None or isinstance(value, str) else str(value)

        return {
            "quant_method": self.quant_method,
            "quantpatch_version": self.quantpatch_version,
            "recipe": named(self.recipe),
            "skip": named(self.skip),
            "include": named(self.include),
            "plugins": named(self.plugins),
            "rules": named(self.rules),
            "operations": named(self.operations),
        }


class QuantPatchQuantizer(HfQuantizer):
    """What transformers calls while it loads and saves a model; not for use by itself.

    A quantized model stays one of ordinary layers and dtypes: it trains, moves and casts as a float one.

    Args:
        quantization_config: The configuration.
        pre_quantized: Whether it came with the checkpoint.
        **kwargs: Handed on.
    """

    quantization_config: QuantPatchConfig

    def __init__(
        self, quantization_config: QuantPatchConfig, *, pre_quantized: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(quantization_config, pre_quantized=True, **kwargs)
        self.is_saved = pre_quantized
        self.built_in_block = False
        self._plan: StructurePlan | None = None
        self._ignored: Any = None
        self._anew: dict[str, list[str]] = {}  # ranges that are not taken, by layer

    # --- what transformers asks ----------------------------------------------------------------

    @property
    def is_trainable(self) -> bool:
        """Yes."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Yes: it is what fake quantization is for."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Yes."""
        return True

    def is_serializable(self) -> bool:
        """Yes."""
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Names a recipe that does not exist before any weight is read."""
        if not self.is_saved and self.quantization_config.recipe is not None:
            qp.registry.recipe(self.quantization_config.recipe)

    # --- loading -------------------------------------------------------------------------------

    def preprocess_model(self, model: PreTrainedModel, dtype: Any = None, **kwargs: Any) -> None:
        """Gives the model, still without weights, its layers and quantizers.

        Raises:
            CheckpointError: The files do not say how the model is quantized, or do not fit it.
            QuantPatchError: The configuration does not fit the model.
        """
        model.quantization_method = METHOD  # type: ignore[assignment]
        checkpoint = Checkpoint(kwargs.get("checkpoint_files") or ())
        if self.is_saved:
            description = self._saved_description(checkpoint, model)
            checkpoint.find_ranges(model, description["aliases"])
            self._anew = checkpoint.leave_out_resized(model)
            described = description["quantizers"]
            for name in described.keys() & {name for names in self._anew.values() for name in names}:
                described[name] = {**described[name], "known": False}
        else:
            if self.built_in_block:
                quantize_operations_early(model)
            else:
                self._convert(model)
            checkpoint.find_ranges(model)
            checkpoint.leave_out_unknown()
            self._anew = checkpoint.leave_out_resized(model)
            if checkpoint.zero_points:
                raise CheckpointError(
                    f"{checkpoint.path}: it has zero points ({checkpoint.zero_points[0]}, …), and does not "
                    f"say how its model was quantized. Write make_savable(model) before "
                    f"model.save_pretrained(...)",
                    path=checkpoint.path,
                )
            description = _describe(model, known=checkpoint.range_names)
        plan = StructurePlan(model, description, checkpoint.ranges())
        if plan.problems:
            raise CheckpointError(
                f"{checkpoint.path} cannot be loaded into {type(model).__name__}:\n  "
                + "\n  ".join(plan.problems[:12]),
                path=checkpoint.path,
                problems=tuple(plan.problems),
            )
        plan.restructure()
        for quantizer in named_quantizers(model).values():
            quantizer.leave_meta()
        self._plan = plan
        # transformers finds no place for the ranges, which are set afterwards, and would warn of them.
        self._ignored = model._keys_to_ignore_on_load_unexpected
        taken = checkpoint.patterns_of(named_quantizers(model, every_name=True))
        model._keys_to_ignore_on_load_unexpected = {*(self._ignored or ()), *taken}

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Sets the ranges; the model has its weights, on their devices."""
        plan, self._plan = self._plan, None
        model._keys_to_ignore_on_load_unexpected, self._ignored = self._ignored, None
        assert plan is not None
        plan.set_ranges()
        anew, self._anew = self._anew, {}
        if anew:
            warnings.warn(
                f"{', '.join(anew)} of {type(model).__name__} start from scratch, as their weights have "
                f"other shapes in the checkpoint, and their ranges with them: "
                f"{', '.join(name for names in anew.values() for name in names)}. Write "
                f"qp.calibrate(model, batches, existing='keep')",
                QuantPatchWarning,
                stacklevel=2,
            )
        for module in model.modules():
            if isinstance(module, qp.TensorQuantizer):
                module.train(model.training)
        self._show_in(model.config)

    def _show_in(self, config: Any) -> None:
        """As ``config.json`` has it, which ``from_pretrained`` also takes if it is given the config."""
        config.quantization_config = self.quantization_config.to_dict()

    def _convert(self, model: PreTrainedModel) -> None:
        config = self.quantization_config
        if any(isinstance(module, QuantizedLayer) for module in model.modules()):
            raise ConversionError(
                f"{type(model).__name__} was built inside a block, which has quantized it already. Leave out "
                f"quantization_config=QuantPatchConfig(...), or load it outside the block"
            )
        qp.convert(
            model,
            skip=config.skip,
            recipe=config.recipe,
            plugins=config.plugins,
            include=config.include,
            operations=config.operations,
        )
        if config.rules:
            qp.configure(model, config.rules)

    @staticmethod
    def _saved_description(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, Any]:
        """What the files say, with the names that modules have in this model."""
        text = checkpoint.metadata().get(_METADATA)
        if text is None:
            raise CheckpointError(
                f"{checkpoint.path}: its config says that quantpatch quantized it, and its files do not say "
                f"how; another program rewrote them, they are not safetensors files, or those of a float "
                f"model. Delete quantization_config from config.json, or from the config that was given, and "
                f"load it in a block if it was quantized: with quantize_modules(recipe=...): ...",
                path=checkpoint.path,
            )
        try:
            saved = json.loads(text)
            return {
                **saved,
                **{
                    kind: {new: saved[kind][name] for name, new in names_in(model, saved[kind]).items()}
                    for kind in ("layers", "quantizers")
                },
                "aliases": dict(saved["aliases"]),
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{checkpoint.path}: its description cannot be read ({type(error).__name__}: {error})",
                path=checkpoint.path,
            ) from error

    # --- saving --------------------------------------------------------------------------------

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What goes into the files; of a model that was reverted to float, what goes in anyway."""
        quantizers = named_quantizers(model)
        if not quantizers:
            vars(model.config).pop("quantization_config", None)
            return None, {}
        self._show_in(model.config)
        description = _describe(model)
        aliases = aliased(
            model, [name for name, described in description["quantizers"].items() if described["known"]]
        )
        state = None
        if aliases:
            description["aliases"] = aliases
            state = dict(qp.float_state_dict(model))
            for name, key in aliases.items():
                held = quantizers[name].state_dict()
                state[key] = held[RANGE_KEY]
                if ZERO_POINT_KEY in held:
                    state[key.removesuffix(RANGE_KEY) + ZERO_POINT_KEY] = held[ZERO_POINT_KEY]
        return state, {_METADATA: json.dumps(description)}


def _describe(model: PreTrainedModel, known: Iterable[str] | None = None) -> dict[str, Any]:
    """How a model is quantized; of whose quantizers only those that are named have a range, if any are."""
    description = describe(model)
    if known is not None:
        names = set(known)
        for name, quantizer in description["quantizers"].items():
            quantizer["known"] = name in names
    # Quantizers that are shared are shared again where the model is built.
    del description["shared"]
    return {**description, "aliases": {}, "tied": {}}


def make_savable(model: PreTrainedModel) -> None:
    """Lets ``model.save_pretrained`` write how the model is quantized, beside its weights and ranges.

    Models from ``from_pretrained`` are so already, if they were quantized there or in a block around it; this
    is for those that were built from a configuration, or converted. Once is enough, whatever changes later.

    Args:
        model: The model.

    Raises:
        ConversionError: transformers has another quantization method for it.
    """
    there = getattr(model, "hf_quantizer", None)
    if isinstance(there, QuantPatchQuantizer):
        return
    if there is not None:
        method = there.quantization_config.quant_method
        raise ConversionError(
            f"{type(model).__name__} is quantized by {getattr(method, 'value', method)!r} and saved its way"
        )
    _give_own_config(model)
    model.hf_quantizer = QuantPatchQuantizer(QuantPatchConfig(recipe=None))  # type: ignore[assignment]
    model.quantization_method = METHOD  # type: ignore[assignment]


def _give_own_config(model: PreTrainedModel) -> None:
    """Gives a model a config that no other model has, which would be saved as a quantized one by it."""
    shared = model.config
    own = copy.copy(shared)
    for module in model.modules():
        for name, value in vars(module).items():
            if value is shared:
                vars(module)[name] = own


def get_hf_quantizer(config: Any, quantization_config: Any, *args: Any, **kwargs: Any) -> Any:
    """The function of this name in transformers, for ``from_pretrained`` inside a block.

    A model that is built there is quantized by the block, and gets its ranges from the checkpoint if that has
    any. What asks for a method of quantization itself gets it.
    """
    text = config.get_text_config(decoder=True)
    asked = (
        quantization_config
        or getattr(config, "quantization_config", None)
        or getattr(text, "quantization_config", None)
    )
    if asked or kwargs.get("gguf_file") is not None:
        return auto.get_hf_quantizer(config, quantization_config, *args, **kwargs)  # type: ignore[no-untyped-call]
    own = QuantPatchConfig(recipe=active_recipe())
    found = auto.get_hf_quantizer(config, own, *args, **kwargs)  # type: ignore[no-untyped-call]
    found[0].built_in_block = True
    return found


# transformers refuses a second registration, as of a module that is loaded anew.
auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
auto.AUTO_QUANTIZER_MAPPING.pop(METHOD, None)
auto.register_quantization_config(METHOD)(QuantPatchConfig)
auto.register_quantizer(METHOD)(QuantPatchQuantizer)
leave_ranges_untied()

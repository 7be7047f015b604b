"""The section of a recipe on the optimisation. Imports no torch."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from sift_cli.recipe.kinds import PositiveInt, Section, checked

AUTO = "auto"  # of learning_rate
Number = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Rate = Number | Literal["auto"]


def _rate(value: object) -> object:
    """A learning rate, `auto`, or None where it is left to the density."""
    if value is None or value == AUTO:
        return value
    try:
        return checked(Number, value)
    except ValueError:
        if isinstance(value, str):
            raise ValueError(f"give a number above 0, or auto, got {value!r}") from None
        raise


OFF = "off"  # of train.chunk_loss
ChunkLoss = PositiveInt | Literal["auto", "off"]


def _chunk_loss(value: object) -> object:
    """A number of tokens, `auto`, or `off`, which YAML reads as false."""
    if value is False or value == OFF:
        return OFF
    if value == AUTO or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise ValueError(f"give auto, off or a number of tokens, got {value!r}")


BALANCED = "balanced"  # of train.class_weights
ClassWeights = Literal["balanced"] | dict[str, Number]


def _class_weights(value: object) -> object:
    """`balanced`, or a weight above 0 by class."""
    if isinstance(value, dict):
        return checked(dict[str, Number], value)
    if value in (None, BALANCED):
        return value
    raise ValueError(f"give balanced, or {{CLASS: WEIGHT}}, got {value!r}")


class TrainSection(Section):
    """The optimisation."""

    epochs: Annotated[float, Field(gt=0)] = 3
    max_steps: PositiveInt | None = Field(None, description="stop after so many steps")
    batch_size: PositiveInt = 32
    max_tokens: PositiveInt | None = Field(
        None,
        description="tokens at once, padding included; a batch of more is computed in parts that "
        "make the same step",
    )
    accumulate: PositiveInt = Field(1, description="batches whose gradients make one step")
    tokens: PositiveInt | None = Field(
        None,
        description="tokens that make one step, at most, in place of batch_size x accumulate rows; "
        "for packed rows",
    )
    packing: bool | None = Field(
        None,
        description="rows of language tasks end to end, in packs of max_tokens (1024, or "
        "the longest row) with no padding; unset: where tokens is given",
    )
    chunk_loss: Annotated[ChunkLoss, BeforeValidator(_chunk_loss)] = Field(
        "auto",
        description="supervised tokens of language tasks whose logits are computed at once, the "
        "rest again in the backward pass; auto: 32 MiB of logits, 256 on a GPU, at most 1024 "
        "tokens; off: all",
    )
    learning_rate: Annotated[Rate | None, BeforeValidator(_rate)] = Field(
        None,
        description="the usual one if unset: 4e-3 at 1 % of a model 384 wide, less the more "
        "entries train, the wider the model, and where the policy bears less; auto: the best of a "
        "few, each tried for a tenth of the steps and scored by its loss on a tenth of the "
        "training rows",
    )
    learning_rate_from: Literal["auto"] | None = Field(
        None, description="how a run whose recipe says auto notes that its rate was found so"
    )
    step_scale: Literal["none", "input"] = Field(
        "none",
        description="input: each entry's rate is divided by how loud its input is, beside the "
        "median input of its weight; the policy's own if unset",
    )
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    decay_toward: Literal["zero", "base"] = Field(
        "zero", description="where weight decay pulls the entries; new modules are pulled to zero"
    )
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.06, description="share of the steps")
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    class_weights: Annotated[ClassWeights | None, BeforeValidator(_class_weights)] = Field(
        None,
        description="what a row counts in the loss by its class: {CLASS: WEIGHT}, 1 for classes "
        "that are not named; balanced: all classes alike, however many rows they have",
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of each label that is spread over all classes"
    )
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="bfloat16 autocast or none; auto: bfloat16 on a GPU that has it"
    )
    gradient_checkpointing: bool | Literal["wide", "auto"] = Field(
        "auto",
        description="activations that the backward pass computes again, so as not to keep them: "
        "all, or those that are cheap or wider than a layer's input; auto: wide for causal "
        "language models, none for others",
    )
    offload_optimizer: bool = Field(
        False,
        description="masters, gradients and moments of what trains on the host: 16 bytes an entry "
        "less on the device, and slower",
    )
    skip_nonfinite: Annotated[int, Field(ge=0, strict=True)] = Field(
        0, description="steps to pass over whose loss or gradient is not finite; one more stops"
    )
    head_start: Literal["random", "probe", "prior", "auto"] = Field(
        "random",
        description="what a new head begins with: random numbers, a linear probe of the base's "
        "features, or a bias at the log frequencies of the classes (the mean of numbers); auto: a "
        "probe where the model and the task allow it; the policy's own if unset",
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42

    @model_validator(mode="after")
    def _one_size_of_a_step(self) -> "TrainSection":
        if self.tokens is None:
            if self.packing:
                raise ValueError("packing: give train.tokens too, which says how many make a step")
            return self
        if self.packing is False:
            raise ValueError(
                "tokens: it is the size of a step of packed rows; without packing give batch_size "
                "and accumulate"
            )
        for key in ("batch_size", "accumulate"):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: train.tokens says what makes a step; give one of the two")
        return self

    @property
    def packs(self) -> bool:
        """Whether rows are packed, `tokens` to a step."""
        return self.tokens is not None

    @property
    def rate(self) -> float:
        """The learning rate, of a recipe that does not leave it open."""
        assert isinstance(self.learning_rate, float)
        return self.learning_rate

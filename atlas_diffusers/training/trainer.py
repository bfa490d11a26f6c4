"""One training run: networks, noise, optimiser and the loop, on top of Accelerate."""

import math
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DistributedType, gather_object
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import logging
from torch.utils.data import DataLoader

from ..config import TrainingConfig
from .buckets import BucketSampler
from .caching import CachedPictures, CaptionCache, WithClassPictures
from .checkpoints import (
    check_files,
    is_hashed,
    latest_checkpoint,
    newest_complete,
    read_layout,
    read_state,
    read_tensors,
    save_checkpoint,
)
from .data import Annotated, PictureDataset
from .deriving import complete_recipe
from .evaluation import Evaluator, write_evaluation
from .learner import Called, Learner, drain, fill, hollow_copy, plain_name, whole
from .locking import RunLock
from .networks import build_components, side_multiple
from .objective_table import objective_class
from .optimizers import build_optimizer, named_weights
from .order import SEED_STRIDE, StepSampler, StreamSampler
from .outputs import build_evaluator, build_pipeline, class_pictures, load_pictures, sample_grid, save_result
from .processes import check_agreement, join_processes
from .recorder import Recorder
from .resuming import compare_origins, origin_of
from .semidiscrete import SemidiscreteSampler, couple_data
from .sharing import push, write_card
from .snapshot import Snapshot
from .stopping import StopRequest, TrainingStopped, leave_signals_alone
from .summary import summarise

logger = logging.get_logger(__name__)


class Trainer:
    """
    Trains a network (and a text encoder, if the recipe has one), or adapters, by one of :data:`~.objective_table.OBJECTIVES`.

    Every random number is a function of the seed and of a picture's place in the run: processes share them as one process would
    have them, and a resumed run repeats exactly what an uninterrupted one does.

    Args:
        config: the recipe.
        cpu: leave GPUs alone.
    """

    def __init__(self, config: TrainingConfig, cpu: bool = False):
        self.micro_batch = config.micro_batch_size or config.batch_size
        self.accumulation = config.batch_size // self.micro_batch
        self.accelerator = join_processes(config, cpu)
        config = config.model_copy(update={"mixed_precision": self.accelerator.mixed_precision})
        check_agreement(config.model_dump(mode="json"), "recipes")
        self.folder = Path(config.output_dir)
        self.lock = RunLock(self.folder)
        self.lock.check()
        self.pictures = load_pictures(config, config.dataset)
        self.plain = self.pictures.pictures if isinstance(self.pictures, Annotated) else self.pictures
        self.dataset: PictureDataset | Annotated = self.pictures
        reading = config.init_from is None and config.text_encoder is not None
        texts = self.pictures.captions() if reading else []
        given, config = config, complete_recipe(config, self.pictures, texts, self.accelerator.num_processes)
        self.config, self.derived = config, config.model != given.model
        self.components = build_components(config, texts)
        if config.dataset.label_column is not None:
            self.dataset.check_labels(self.components.unet.config.num_class_embeds)
        self.buckets = None
        if config.dataset.aspect_buckets:
            self.buckets = self.plain.choose_sizes(side_multiple(self.components, config))
        self.plain.tells_sizes = self.components.family.tells_sizes
        self.networks = self.components.networks
        self.origin = origin_of(config, self.components, self.pictures, self.accelerator.num_processes)
        check_agreement(self.origin["contents"], "data or weights")
        self._prepare()
        self.objective = objective_class(config)(config, self.accelerator, self.components, self.wrapped, self._caches())
        self.objective.prepare(self.pictures)
        self.coupling = None
        if config.coupling == "semidiscrete":
            self.coupling = couple_data(config, self.dataset, self.components.vae, self.folder / "cache")
        self.step, self.skipped, self.streams = 0, 0, None
        checkpoint = (newest_complete if config.resume == "newest_complete" else latest_checkpoint)(self.folder)
        if checkpoint is not None:
            if not config.resume:
                raise ValueError(f"resume is false, but {checkpoint} exists; choose another output_dir or remove it")
            self._restore(checkpoint)

    def summary(self) -> str:
        """What the run is about to do; see :func:`~.summary.summarise`."""
        trained = sum(p.numel() for p in self.parameters)
        start = latest_checkpoint(self.folder) and f"{latest_checkpoint(self.folder)}"
        world = self.accelerator.num_processes
        return summarise(self.config, self.pictures, self.components, trained, self.derived, start, world)

    def check(self) -> float:
        """The loss of one micro-batch; nothing is written and nothing learned."""
        generator = torch.Generator().manual_seed(self.config.seed)
        with torch.random.fork_rng([]), torch.no_grad():
            torch.manual_seed(self.config.seed)
            return self._mean_loss([self.objective(next(iter(self._loader())), generator)])

    def _prepare(self) -> None:
        """Give what trains to the accelerator, which may split its weights, and the optimiser with it."""
        c, accelerator = self.config, self.accelerator
        trained = {name: m for name, m in self.networks.items() if any(p.requires_grad for p in m.parameters())}
        frozen = {name: m for name, m in self.networks.items() if name not in trained}
        for module in (*frozen.values(), *self.components.others):
            module.to(accelerator.device)
        self.trained, self.split = list(trained), accelerator.distributed_type == DistributedType.FSDP
        if self.split:
            self.hollow = {name: hollow_copy(network) for name, network in trained.items()}
        elif accelerator.device.type == "cuda":  # faster there; on a CPU group norm and SiLU lose more than convolutions gain
            self.components.unet.to(memory_format=torch.channels_last)
        optimizer = build_optimizer(c.optimizer, trained, c.learning_rate, c.weight_decay)
        self.lr_scheduler = get_scheduler(
            c.lr_scheduler, optimizer, num_warmup_steps=c.warmup_steps, num_training_steps=c.steps
        )
        modules = [Learner(trained)] if self.split else trained.values()
        *self.prepared, self.optimizer = accelerator.prepare(*modules, optimizer)
        called = [Called(self.prepared[0], name) for name in trained] if self.split else self.prepared
        self.wrapped = frozen | dict(zip(trained, called))
        named = {plain_name(name): p for name, p in named_weights(trained).items()}
        self.parameters = list(named.values())
        self.ema = EMAModel(self.parameters, decay=c.ema_decay, inv_gamma=1.0, power=0.75, use_ema_warmup=True)
        self.snapshot = Snapshot(named, self.ema, self.optimizer, self.lr_scheduler)

    def _caches(self) -> CaptionCache | None:
        """Replace pictures by cached latents, and return cached captions, where the recipe says so; add class pictures."""
        c, components, captions, cache, others = self.config, self.components, None, self.folder / "cache", None
        if not (c.cache_latents or c.cache_text_embeddings or c.class_images):
            return None
        with self.lock if self.accelerator.is_main_process else nullcontext():
            if c.class_images is not None:
                with self.averaged() as networks, self.accelerator.main_process_first():
                    others = class_pictures(c, c.class_images, build_pipeline(c, components, networks))
                others.tells_sizes = components.family.tells_sizes
            if c.cache_text_embeddings:
                texts = [*self.pictures.captions(), *(others.captions() if others else [])]
                family = components.family(components, self.wrapped, c)
                captions = CaptionCache(texts, family.encode, cache, family.fingerprint())
            if c.cache_latents:
                self.dataset = CachedPictures(self.plain, components.vae, cache)
                others = others and CachedPictures(others, components.vae, cache)
            if others is not None:
                self.dataset = WithClassPictures(self.dataset, others)
        return captions

    # ------------------------------------------------------------------ loop

    def train(self) -> Path:
        """
        Run to ``max_steps``, save the pipeline (or the adapters) and return its folder.

        Raises:
            TrainingStopped: after SIGINT or SIGTERM, once the step is done and a checkpoint written.
            ValueError: if another process trains into the same folder.
        """
        c, main = self.config, self.accelerator.is_main_process
        with ExitStack() as stack:
            if main:
                stack.enter_context(self.lock)
                (self.folder / "recipe.json").write_text(c.model_dump_json(indent=1), encoding="utf-8")
            evaluator = build_evaluator(c) if c.eval_interval else None
            recorder = stack.enter_context(Recorder(c, self.accelerator, self.step))
            self._run(recorder, evaluator, stack.enter_context(StopRequest()))
            return self._finish(recorder)

    def _finish(self, recorder: Recorder) -> Path:
        c, main = self.config, self.accelerator.is_main_process
        recorder.finish()
        result = self.folder / ("pipeline" if c.lora is None else "lora")
        with self.averaged() as networks:
            if main:
                save_result(c, self.components, networks, result)
        if main:
            write_card(c, self.pictures, self.folder, result)
            if c.push_to_hub is not None:
                push(result, c.push_to_hub)
        self.accelerator.end_training()
        return result

    def _run(self, recorder: Recorder, evaluator: Evaluator | None, request: StopRequest) -> None:
        c, batches, running, asked, first = self.config, iter(self._loader()), [], None, self.step + 1
        while self.step < c.steps:
            running.append(self._optimizer_step(batches))
            self.step += 1
            recorder.advance(running[0] if self.step == first else None)
            stopping, asked = self._stopping(request, asked)
            saving = stopping or self.step % c.checkpoint_interval == 0 or self.step == c.steps
            if self.step % c.log_interval == 0 or self.step == c.steps:
                self._log(recorder, self._mean_loss(running))
                running.clear()
            elif saving:
                self._mean_loss(running)
            if saving:
                self.save_checkpoint()
            if stopping and self.step < c.steps:
                self._stop(request)
            if c.sample_interval and self.step % c.sample_interval == 0:
                with self.averaged() as networks:
                    grid = sample_grid(c, build_pipeline(c, self.components, networks), self.dataset)
                if self.accelerator.is_main_process:
                    grid.save(self.folder / f"sample-{self.step:06d}.png")
            if evaluator is not None and c.eval_interval and self.step % c.eval_interval == 0:
                self._evaluate(evaluator, recorder)

    def _stopping(self, request: StopRequest, asked: torch.Tensor | None) -> tuple[bool, torch.Tensor | None]:
        """
        Whether to stop after this step, and what to ask after the next one.

        Several processes stop after the same step: they add up who was asked, and read the sum a step later, when it is there.
        """
        if self.accelerator.num_processes == 1:
            return request.number is not None, None
        own = torch.tensor(float(request.number is not None), device=self.accelerator.device)
        return asked is not None and bool(asked.item()), self._reduced(own, "sum")

    def _reduced(self, value: torch.Tensor, reduction: str) -> torch.Tensor:
        """The `sum` or `mean` over all processes."""
        return cast(torch.Tensor, self.accelerator.reduce(value, reduction))

    def _stop(self, request: StopRequest) -> None:
        number = request.number or signal.SIGTERM
        raise TrainingStopped(
            number,
            f"stopped by {signal.Signals(number).name} after step {self.step} of {self.config.steps}; the same command "
            f"goes on from {latest_checkpoint(self.folder)}",
        )

    def _loader(self) -> DataLoader:
        c, accelerator = self.config, self.accelerator
        world, rank, start = accelerator.num_processes, accelerator.process_index, self.step * self.accumulation
        place = {"start": start, "rank": rank, "world": world}
        if c.dataset.streaming:
            state = self.streams[rank] if self.streams else None
            self.sampler = StreamSampler(self.plain.data, c.dataset, self.micro_batch * world, c.seed, state=state, **place)
        elif self.buckets is not None:
            self.sampler = BucketSampler(self.buckets, self.micro_batch * world, c.seed, **place)
        else:
            self.sampler = StepSampler(len(self.dataset), self.micro_batch * world, c.seed, **place)
        if self.coupling is not None:
            self.sampler = SemidiscreteSampler(self.sampler, self.coupling)
        return DataLoader(
            self.dataset,
            batch_sampler=self.sampler,
            num_workers=c.dataset.num_workers,
            worker_init_fn=leave_signals_alone,
            pin_memory=accelerator.device.type == "cuda",
            # a generator of its own: without one DataLoader draws from the global random state
            generator=torch.Generator().manual_seed(c.seed),
        )

    def _optimizer_step(self, batches: Any) -> torch.Tensor:
        c, accelerator, self.objective.step = self.config, self.accelerator, self.step
        if self.objective.begins_pass:
            self.ema.copy_to(self.parameters)
        seed = c.seed * SEED_STRIDE + self.step
        generator, device = torch.Generator().manual_seed(seed), accelerator.device
        total = torch.zeros((), device=device)
        # dropout draws from the global random state: seed it for this step only
        on_cpu = device.type == "cpu"
        with torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
            torch.manual_seed(seed * accelerator.num_processes + accelerator.process_index)
            for part in range(self.accumulation):
                batch = next(batches)
                self.skipped += int(sum(batch.get("skipped", ())))
                last = part == self.accumulation - 1
                with nullcontext() if last else self._alone():
                    loss = self.objective(batch, generator) / self.accumulation
                    accelerator.backward(loss)
                total += loss.detach()
        clipped = list(self.prepared[0].parameters()) if self.split else self.parameters
        norm = whole(cast(torch.Tensor, accelerator.clip_grad_norm_(clipped, c.gradient_clip_norm))).to(device)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if accelerator.optimizer_step_was_skipped:
            return total  # float16: the scale of the loss was too large, and is lower from now on
        self.lr_scheduler.step()
        self.ema.step(self.parameters)
        return torch.where(norm.isfinite(), total, norm)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Gradients stay in their process."""
        with ExitStack() as stack:
            for module in self.prepared:
                stack.enter_context(self.accelerator.no_sync(module))
            yield

    def _mean_loss(self, losses: list[torch.Tensor]) -> float:
        loss = self._reduced(torch.stack(losses).mean(), "mean").item()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss} near step {self.step}; the last checkpoint is kept")
        return loss

    def _log(self, recorder: Recorder, loss: float) -> None:
        recorder.log(self.step, loss, float(self.lr_scheduler.get_last_lr()[0]), self._all_skipped())

    def _all_skipped(self) -> int:
        """Pictures that could not be read so far, in all processes."""
        return self._sum(self.skipped + getattr(self.sampler, "skipped", 0))

    def _sum(self, own: int) -> int:
        return int(self._reduced(torch.tensor(own, device=self.accelerator.device), "sum"))

    # ------------------------------------------------------------------ what is written

    def save_checkpoint(self) -> None:
        """Weights, averages, optimiser moments and the step, complete or not at all."""
        # what a stream skipped is in its state: a run that goes on reads a part of it again
        streams, skipped, scaler = None, self._sum(self.skipped), self.accelerator.scaler
        if isinstance(self.sampler, StreamSampler):
            streams = gather_object([self.sampler.state(self.step * self.accumulation)])
        tensors, state = self.snapshot.take()
        state |= {"streams": streams, "skipped": skipped, "scaler": scaler and scaler.state_dict(), "origin": self.origin}
        save_checkpoint(self.folder, self.step, tensors, state, self.config.checkpoints_total_limit)

    def _restore(self, path: Path) -> None:
        check_files(path)
        layout, state = read_layout(path), read_state(path)
        try:
            tensors = self.snapshot.blank(layout, state)
            changes = compare_origins(state["origin"], self.origin) if state["origin"] else []
        except ValueError as error:
            raise ValueError(f"checkpoint {path} does not fit this recipe: {error}") from error
        if state["step"] > self.config.steps:
            raise ValueError(f"max_steps={self.config.steps}, but {path} is of a later step; choose another output_dir")
        read_tensors(path, tensors)
        self.snapshot.restore(tensors, state)
        if not is_hashed(path) and self.accelerator.is_main_process:
            unknown = "" if state["origin"] else ", nor whether recipe and data are those that it was trained with"
            logger.warning(f"{path} has no hashes: whether its files are intact cannot be checked{unknown}")
        if changes and self.accelerator.is_main_process:
            logger.warning(f"going on from {path} with changes that hold from here on: {'; '.join(changes)}")
        self.step, self.streams = state["step"], state["streams"]
        self.skipped = state["skipped"] if self.accelerator.is_main_process else 0
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        processes = self.accelerator.num_processes
        if self.streams and len(self.streams) != processes:
            raise ValueError(f"checkpoint {path} has a stream split over {len(self.streams)} processes, this run {processes}")

    @contextmanager
    def averaged(self) -> Iterator[dict[str, torch.nn.Module]]:
        """The networks with averaged weights, whole and ready to sample, on every process; all of them must ask for it."""
        with self._gathered() if self.split else self._exchanged():
            networks = self.networks | (self.hollow if self.split else {})
            for network in networks.values():
                network.eval()
            yield networks

    @contextmanager
    def _exchanged(self) -> Iterator[None]:
        """Averages in the place of the weights."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)
            for name in self.trained:
                self.networks[name].train()

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """Copies of networks whose weights are split, with averages gathered from all processes."""
        averages = dict(zip(self.snapshot.parameters, self.ema.shadow_params))
        for name, hollow in self.hollow.items():
            weights = {plain_name(n): p for n, p in self.networks[name].named_parameters()}
            fill(hollow, {n: averages.get(f"{name}.{n}", p) for n, p in weights.items()}, self.accelerator.device)
        try:
            yield
        finally:
            for hollow in self.hollow.values():
                drain(hollow)

    def _evaluate(self, evaluator: Evaluator, recorder: Recorder) -> None:
        with self.averaged() as networks:
            numbers, sheet = evaluator(build_pipeline(self.config, self.components, networks), self.config.eval_count)
        if self.accelerator.is_main_process:
            write_evaluation(numbers, sheet, self.folder / f"evaluation-{self.step:06d}.json")
        recorder.write({"step": self.step, **numbers})

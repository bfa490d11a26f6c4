"""One training run: networks, noise, optimiser and the loop, on top of Accelerate."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils.torch_utils import randn_tensor
from torch.utils.data import DataLoader

import atlas_diffusers

from ..conditioning import tokenize
from ..config import TrainingConfig
from ..pipelines.grids import labelled_grid
from ..pipelines.latents import encode_latents
from .checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint
from .couplings import sinkhorn_pairs
from .data import PictureDataset, StepSampler, load_training_data
from .evaluation import Evaluator, write_evaluation
from .lora import write_adapters
from .losses import denoising_loss, edm_weights, min_snr_weights, offset_noise, p2_weights, stratified_timesteps
from .networks import build_networks
from .recorder import Recorder


class Trainer:
    """
    Trains ``AtlasUNet2DModel`` (and a text encoder, if the recipe has one) to denoise.

    Noise and dropped captions are drawn from a generator of each picture's place in the run, timesteps from one of the step:
    processes share them as one process would have them, and a resumed run repeats exactly what an uninterrupted one does.
    """

    def __init__(self, config: TrainingConfig):
        self.config = config
        self.micro_batch = config.micro_batch_size or config.batch_size
        self.accumulation = config.batch_size // self.micro_batch
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            log_with=config.trackers or None,
            project_dir=config.output_dir,
            dataloader_config=DataLoaderConfiguration(dispatch_batches=False),
        )
        if missing := set(config.trackers) - {"all"} - {str(tracker) for tracker in self.accelerator.log_with}:
            raise ValueError(f"trackers={sorted(missing)}: their packages are not installed")
        self.folder = Path(config.output_dir)
        self.dataset = PictureDataset(load_training_data(config.dataset), config.dataset)
        if len(self.dataset) == 0:
            raise ValueError(f"dataset {config.dataset.name!r} has no pictures in split {config.dataset.split!r}")
        parts = build_networks(config, self.dataset)
        self.tokenizer, self.scheduler = parts.tokenizer, parts.scheduler
        self.vae = None if parts.vae is None else parts.vae.to(self.accelerator.device)
        modules = {"unet": parts.unet, "text_encoder": parts.text_encoder}
        self.networks = {name: module.train() for name, module in modules.items() if module is not None}
        self._build_optimizer()
        self.step = 0
        if (checkpoint := latest_checkpoint(self.folder)) is not None:
            if not config.resume:
                raise ValueError(f"resume is false, but {checkpoint} exists; choose another output_dir or remove it")
            self._restore(checkpoint)

    def _build_optimizer(self) -> None:
        c = self.config
        self.parameters = [p for module in self.networks.values() for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=c.learning_rate, betas=(0.9, 0.99), weight_decay=c.weight_decay, fused=True
        )
        self.lr_scheduler = get_scheduler(
            c.lr_scheduler, self.optimizer, num_warmup_steps=c.warmup_steps, num_training_steps=c.max_steps
        )
        self.ema = EMAModel(self.parameters, decay=c.ema_decay, inv_gamma=1.0, power=0.75, use_ema_warmup=True)
        trained = {name: m for name, m in self.networks.items() if any(p.requires_grad for p in m.parameters())}
        *prepared, self.optimizer = self.accelerator.prepare(*trained.values(), self.optimizer)
        frozen = {name: m.to(self.accelerator.device) for name, m in self.networks.items() if name not in trained}
        self.wrapped = frozen | dict(zip(trained, prepared))
        self.ema.to(self.accelerator.device)

    # ------------------------------------------------------------------ loop

    def train(self) -> Path:
        """Run to ``max_steps``, save the pipeline and return its folder."""
        c, main = self.config, self.accelerator.is_main_process
        self.folder.mkdir(parents=True, exist_ok=True)
        if main:
            (self.folder / "recipe.json").write_text(c.model_dump_json(indent=1))
        evaluator = self._evaluator() if main and c.eval_interval else None
        recorder, batches, running = Recorder(c, self.accelerator, self.step), iter(self._loader()), []
        while self.step < c.max_steps:
            running.append(self._optimizer_step(batches))
            self.step += 1
            recorder.bar.update()
            saving = self.step % c.checkpoint_interval == 0 or self.step == c.max_steps
            if self.step % c.log_interval == 0:
                self._log(recorder, self._mean_loss(running))
                running.clear()
            elif saving:
                self._mean_loss(running)
            if saving:
                self.save_checkpoint()
            if c.sample_interval and self.step % c.sample_interval == 0 and main:
                self._sample_grid()
            if evaluator is not None and self.step % c.eval_interval == 0:
                self._evaluate(evaluator, recorder)
        recorder.finish()
        result = self.folder / ("pipeline" if c.lora is None else "lora")
        if main:
            (self.save_pipeline if c.lora is None else self.save_lora)(result)
        self.accelerator.end_training()
        return result

    def _loader(self) -> DataLoader:
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        sampler = StepSampler(
            len(self.dataset), self.micro_batch * world, self.config.seed, start=self.step * self.accumulation
        )
        share = _Shard(sampler, rank, world)
        # a generator of its own: without one DataLoader draws from the global random state
        generator = torch.Generator().manual_seed(self.config.seed)
        return DataLoader(
            self.dataset, batch_sampler=share, num_workers=self.config.dataset.num_workers, generator=generator
        )

    def _optimizer_step(self, batches) -> torch.Tensor:
        c = self.config
        seed = c.seed * 1_000_003 + self.step
        generator = torch.Generator().manual_seed(seed)
        device = self.accelerator.device
        total = torch.zeros((), device=device)
        # dropout draws from the global random state: seed it for this step only
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
            torch.manual_seed(seed * self.accelerator.num_processes + self.accelerator.process_index)
            for part in range(self.accumulation):
                last = part == self.accumulation - 1
                with nullcontext() if last else self.accelerator.no_sync(self.wrapped["unet"]):
                    loss = self._loss(next(batches), generator) / self.accumulation
                    self.accelerator.backward(loss)
                total += loss.detach()
        norm = self.accelerator.clip_grad_norm_(self.parameters, c.gradient_clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        self.ema.step(self.parameters)
        return torch.where(norm.isfinite(), total, norm)

    def _loss(self, batch: dict, generator: torch.Generator) -> torch.Tensor:
        c, device = self.config, self.accelerator.device
        data = batch["pixels"].to(device, memory_format=torch.channels_last)
        own = [torch.Generator().manual_seed(draw) for draw in batch["draw"].tolist()]
        if self.vae is not None:
            with torch.no_grad():
                data = encode_latents(self.vae, data, own)
        noise = randn_tensor(data.shape, own, device, data.dtype)
        if c.offset_noise:
            noise = offset_noise(noise, c.offset_noise, own)
        if c.coupling == "sinkhorn":
            noise = noise[sinkhorn_pairs(noise, data, c.coupling_epsilon, generator, relative=True)]
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        everywhere = stratified_timesteps(len(data) * world, len(self.scheduler), generator, c.timestep_shift)
        timesteps = everywhere.chunk(world)[rank].to(device)
        alpha, sigma = self.scheduler.levels_at(timesteps, like=data)
        kept = torch.cat([torch.rand(1, generator=each) for each in own]) >= c.caption_dropout
        context = None
        if self.tokenizer is not None:
            texts = [text if keep else "" for text, keep in zip(batch["text"], kept.tolist())]
            context = self.wrapped["text_encoder"](tokenize(self.tokenizer, texts).to(device)).last_hidden_state
        output = self.wrapped["unet"](alpha * data + sigma * noise, timesteps, context).sample
        levels, prediction_type = (alpha.flatten(), sigma.flatten()), self.scheduler.config.prediction_type
        return denoising_loss(output, data, noise, *levels, prediction_type, self._weights(prediction_type, *levels))

    def _weights(self, prediction_type: str, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor | None:
        c = self.config
        choices = ((min_snr_weights, c.min_snr_gamma), (p2_weights, c.p2_gamma), (edm_weights, c.edm_sigma_data))
        return next((weights(prediction_type, alpha, sigma, value) for weights, value in choices if value is not None), None)

    def _mean_loss(self, losses: list[torch.Tensor]) -> float:
        loss = self.accelerator.reduce(torch.stack(losses).mean(), "mean").item()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss} near step {self.step}; the last checkpoint is kept")
        return loss

    def _log(self, recorder: Recorder, loss: float) -> None:
        recorder.log(self.step, loss, self.lr_scheduler.get_last_lr()[0])

    # ------------------------------------------------------------------ what is written

    def save_checkpoint(self) -> None:
        """Weights, averages, optimiser moments and the step, complete or not at all."""
        if self.accelerator.is_main_process:
            tensors = {f"weight.{i}": p for i, p in enumerate(self.parameters)}
            tensors |= {f"average.{i}": p for i, p in enumerate(self.ema.shadow_params)}
            moments = self.optimizer.state_dict()["state"]
            tensors |= {f"moment.{i}.{k}": v for i, entry in moments.items() for k, v in entry.items()}
            schedule = {k: v for k, v in self.lr_scheduler.state_dict().items() if k != "lr_lambdas"}
            state = {"ema_step": self.ema.optimization_step, "lr_scheduler": schedule}
            save_checkpoint(self.folder, self.step, tensors, state, self.config.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()

    def _restore(self, path: Path) -> None:
        tensors, state = load_checkpoint(path)
        for i, p in enumerate(self.parameters):
            found = tensors.get(f"weight.{i}")
            if found is None or found.shape != p.shape:
                shape = None if found is None else tuple(found.shape)
                raise ValueError(f"checkpoint {path}: weight {i} has shape {shape}, this recipe's has {tuple(p.shape)}")
            p.data.copy_(found)
            self.ema.shadow_params[i].copy_(tensors[f"average.{i}"])
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = {
            i: {"step": tensors[f"moment.{i}.step"]}
            # the fused update runs over raw memory: moments need the layout of their weight
            | {k: torch.empty_like(p).copy_(tensors[f"moment.{i}.{k}"]) for k in ("exp_avg", "exp_avg_sq")}
            for i, p in enumerate(self.parameters)
        }
        self.optimizer.load_state_dict(optimizer)
        self.ema.optimization_step = state["ema_step"]
        self.lr_scheduler.load_state_dict({**self.lr_scheduler.state_dict(), **state["lr_scheduler"]})
        for group, rate in zip(self.optimizer.param_groups, state["lr_scheduler"]["_last_lr"]):
            group["lr"] = rate
        self.step = state["step"]

    def build_pipeline(self, networks: dict[str, torch.nn.Module]):
        """The pipeline around the trained networks, or copies of them."""
        return atlas_diffusers.AtlasPipeline(
            unet=networks["unet"],
            scheduler=self.scheduler,
            vae=self.vae,
            text_encoder=networks.get("text_encoder"),
            tokenizer=self.tokenizer,
            default_guidance_scale=self.config.guidance_scale,
            default_num_inference_steps=self.config.sample_steps,
        )

    @contextmanager
    def averaged(self) -> Iterator[dict[str, torch.nn.Module]]:
        """The networks with averaged weights, ready to sample."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        for network in self.networks.values():
            network.eval()
        try:
            yield self.networks
        finally:
            self.ema.restore(self.parameters)
            for network in self.networks.values():
                network.train()

    def save_pipeline(self, folder: Path) -> None:
        """Write a pipeline folder with the averaged weights, and the recipe beside them."""
        with self.averaged() as networks:
            copies = {name: copy.deepcopy(network) for name, network in networks.items()}
        copies["unet"].to(getattr(torch, self.config.save_dtype))
        self.build_pipeline(copies).save_pretrained(folder)
        self._write_recipe(folder)

    def save_lora(self, folder: Path) -> None:
        """Write the averaged adapters as Diffusers' ``load_lora_weights`` reads them, and the recipe beside them."""
        with self.averaged() as networks:
            write_adapters(folder, networks, getattr(torch, self.config.save_dtype))
        self._write_recipe(folder)

    def _write_recipe(self, folder: Path) -> None:
        (folder / "recipe.json").write_text(self.config.model_dump_json(indent=1) + "\n")

    def _sample_grid(self) -> None:
        prompts = self.config.sample_prompts
        count = len(prompts) or 8
        generators = [torch.Generator().manual_seed(i) for i in range(count)]
        arguments = {"prompt": prompts} if prompts else {"num_images_per_prompt": count}
        with self.averaged() as networks:
            pipeline = self.build_pipeline(networks)
            pipeline.set_progress_bar_config(disable=True)
            images = pipeline(**arguments, generator=generators).images
        labelled_grid(images, prompts or [""] * count).save(self.folder / f"sample-{self.step:06d}.png")

    def _evaluator(self) -> Evaluator:
        config = self.config.eval_dataset or self.config.dataset.model_copy(update={"random_flip": False})
        return Evaluator(PictureDataset(load_training_data(config), config))

    def _evaluate(self, evaluator: Evaluator, recorder: Recorder) -> None:
        with self.averaged() as networks:
            pipeline = self.build_pipeline(networks)
            pipeline.set_progress_bar_config(disable=True)
            numbers, sheet = evaluator(pipeline, self.config.eval_count)
        write_evaluation(numbers, sheet, self.folder / f"evaluation-{self.step:06d}.json")
        recorder.write({"step": self.step, **numbers})


class _Shard:
    """Every process's contiguous share of each batch of a sampler over the whole world."""

    def __init__(self, sampler: StepSampler, rank: int, world: int):
        self.sampler, self.rank, self.world = sampler, rank, world

    def __iter__(self):
        for batch in self.sampler:
            share = len(batch) // self.world
            yield batch[self.rank * share : (self.rank + 1) * share]

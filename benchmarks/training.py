"""Training speed beside Diffusers' example loop: python benchmarks/training.py

Both train a text-to-image network on the embedded emoji, 32x32 pixels, batch 32, float32, one thread, with a frozen text
encoder. Ours is `Trainer`, once with the structure of theirs and once with the 2x2 patches of `training/recipes/emoji.yaml`;
theirs is a UNet2DConditionModel with as many parameters in the loop of examples/text_to_image/train_text_to_image.py (AdamW,
averages, clipping, the loss read at every step), without its autoencoder. A side runs in a process of its own, the sides take
turns, and the table has medians of images a CPU second.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

BATCH, RESOLUTION = 32, 32
TEXT = {"hidden_size": 128, "num_layers": 2, "num_heads": 4}
OURS = {
    "sample_size": 32, "base_channels": 48, "channel_mult": [1, 2, 2], "num_res_blocks": 1, "attention_levels": [1],
    "cross_attention_levels": [1], "num_heads": 4, "norm_num_groups": 16, "cross_attention_dim": 128,
}  # fmt: skip
THEIRS = {
    "sample_size": 32, "in_channels": 3, "out_channels": 3, "block_out_channels": (48, 96, 96), "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4, "norm_num_groups": 16, "cross_attention_dim": 128,
}  # fmt: skip
SIDES = ("diffusers", "atlas", "atlas, patch_size 2")


def text_parts():
    from atlas_diffusers.conditioning import build_text_encoder, build_tokenizer
    from atlas_diffusers.pretrained import load_emoji

    data = load_emoji("train")
    tokenizer = build_tokenizer(data["text"], 1536, 16)
    return data, tokenizer, build_text_encoder(tokenizer, **TEXT)


def ours(patch_size: int, warm: int, steps: int) -> dict:
    from atlas_diffusers import AtlasDDIMScheduler, AtlasPipeline, AtlasUNet2DModel
    from atlas_diffusers.config import TrainingConfig
    from atlas_diffusers.training import Trainer

    _, tokenizer, encoder = text_parts()
    with tempfile.TemporaryDirectory() as folder:
        unet = AtlasUNet2DModel(**OURS, patch_size=patch_size)
        AtlasPipeline(unet, AtlasDDIMScheduler(clip_sample=False), None, encoder, tokenizer).save_pretrained(folder + "/start")
        run = Trainer(TrainingConfig(
            output_dir=folder + "/run", init_from=folder + "/start", text_encoder=None, train_text_encoder=False,
            cache_text_embeddings=True, batch_size=BATCH, max_steps=warm + steps,
            dataset={"resolution": RESOLUTION, "random_flip": True},
        ))  # fmt: skip
        batches, losses = iter(run._loader()), []
        for step in range(warm + steps):
            if step == warm:
                start = time.process_time()
            losses.append(run._optimizer_step(batches))
            run.step += 1
        run._mean_loss(losses)
        return {"seconds": time.process_time() - start, "parameters": unet.num_parameters()}


def theirs(warm: int, steps: int) -> dict:
    import torch
    import torch.nn.functional as F
    from accelerate import Accelerator
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from torchvision import transforms
    from tqdm.auto import tqdm

    from atlas_diffusers.conditioning import tokenize

    data, tokenizer, text_encoder = text_parts()
    accelerator, noise_scheduler = Accelerator(cpu=True), DDPMScheduler()
    unet = UNet2DConditionModel(**THEIRS)
    text_encoder.requires_grad_(False)
    ema_unet = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    train_transforms = transforms.Compose([
        transforms.Resize(RESOLUTION, interpolation=transforms.InterpolationMode.LANCZOS), transforms.CenterCrop(RESOLUTION),
        transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize([0.5], [0.5]),
    ])  # fmt: skip

    def preprocess(examples):
        examples["pixel_values"] = [train_transforms(image.convert("RGB")) for image in examples["image"]]
        examples["input_ids"] = tokenize(tokenizer, list(examples["text"]))
        return examples

    def collate(examples):
        pixels = torch.stack([example["pixel_values"] for example in examples]).contiguous().float()
        return {"pixel_values": pixels, "input_ids": torch.stack([example["input_ids"] for example in examples])}

    loader = torch.utils.data.DataLoader(data.with_transform(preprocess), shuffle=True, collate_fn=collate, batch_size=BATCH)
    lr_scheduler = get_scheduler("constant", optimizer=optimizer, num_warmup_steps=0, num_training_steps=warm + steps)
    unet, optimizer, loader, lr_scheduler = accelerator.prepare(unet, optimizer, loader, lr_scheduler)
    unet.train()
    progress_bar, step = tqdm(range(warm + steps)), 0
    while step < warm + steps:
        for batch in loader:
            if step == warm:
                start = time.process_time()
            if step == warm + steps:
                break
            with accelerator.accumulate(unet):
                latents = batch["pixel_values"]
                noise = torch.randn_like(latents)
                timesteps = torch.randint(0, 1000, (len(latents),)).long()
                noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
                encoder_hidden_states = text_encoder(batch["input_ids"], return_dict=False)[0]
                model_pred = unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
                loss = F.mse_loss(model_pred.float(), noise.float(), reduction="mean")
                avg_loss = accelerator.gather(loss.repeat(BATCH)).mean()
                train_loss = avg_loss.item()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            ema_unet.step(unet.parameters())
            progress_bar.set_postfix(step_loss=loss.detach().item(), average=train_loss, lr=lr_scheduler.get_last_lr()[0])
            progress_bar.update(1)
            step += 1
    return {"seconds": time.process_time() - start, "parameters": unet.num_parameters()}


def run_side(side: str, warm: int, steps: int) -> None:
    result = theirs(warm, steps) if side == "diffusers" else ours(2 if "patch" in side else 1, warm, steps)
    result["mebibytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm", type=int, default=5, help="steps before the clock starts")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--side", choices=SIDES, help="run one side in this process")
    args = parser.parse_args()
    if args.side:
        return run_side(args.side, args.warm, args.steps)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        for side in SIDES:
            command = [sys.executable, __file__, "--side", side, "--warm", str(args.warm), "--steps", str(args.steps)]
            result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            found[side].append(json.loads(result.stdout.splitlines()[-1]))
    print("| | parameters | images/s | ratio (of each round) | peak memory, MiB |\n|---|---|---|---|---|")
    for side, rows in found.items():
        ratios = [base["seconds"] / row["seconds"] for base, row in zip(found["diffusers"], rows)]
        speed = BATCH * args.steps / statistics.median(row["seconds"] for row in rows)
        memory = statistics.median(row["mebibytes"] for row in rows)
        print(f"| {side} | {rows[0]['parameters']:,} | {speed:.1f} | {statistics.median(ratios):.2f} "
              f"({min(ratios):.2f} to {max(ratios):.2f}) | {memory:.0f} |")  # fmt: skip


if __name__ == "__main__":
    main()

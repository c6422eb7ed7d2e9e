"""Few-step students that people already use, as plain data: where each lies, and how it is to be called.

Every row was read against the sources it names (model card, README of its authors, documentation of diffusers), and is pinned to a commit
of its repository at which its files were seen. What no source said plainly has status "unverified": such a row is listed, and `zoo.load`
opens it only with allow_unverified=True. A repository for which no source names a commit is opened at its newest, and its note says so.
Weights that exist only as pickles keep their row, for what it says about sampling; loading one is refused by name."""
from __future__ import annotations

from .rows import Metric, Paper, Student

HUB = "https://huggingface.co/"
SD15, SD21 = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-2-1"
SDXL, SD3 = "stabilityai/stable-diffusion-xl-base-1.0", "stabilityai/stable-diffusion-3-medium-diffusers"
FLUX, QWEN = "black-forest-labs/FLUX.1-dev", "Qwen/Qwen-Image"
# Licence of each base model, by the identifier its repository uses; read it there before relying on it.
BASE_LICENSES = {
    SD15: "creativeml-openrail-m", SD21: "openrail++", SDXL: "openrail++", SD3: "stabilityai-ai-community", FLUX: "flux-1-dev-non-commercial-license",
    QWEN: "apache-2.0", "segmind/SSD-1B": "apache-2.0", "Lykon/dreamshaper-7": "creativeml-openrail-m",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "apache-2.0", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "apache-2.0", "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "apache-2.0",
    "Tongyi-MAI/Z-Image": "apache-2.0", "black-forest-labs/FLUX.2-klein-base-4B": "apache-2.0",
}
# Papers of methods that have no script here.
PAPERS = (
    Paper("lcm_lora", "LCM-LoRA: A Universal Stable-Diffusion Acceleration Module",
          ("Simian Luo", "Yiqin Tan", "Suraj Patil", "Daniel Gu", "Patrick von Platen", "Apolinário Passos", "Longbo Huang", "Jian Li", "Hang Zhao"),
          "2311.05556"),
    Paper("lightning", "SDXL-Lightning: Progressive Adversarial Diffusion Distillation", ("Shanchuan Lin", "Anran Wang", "Xiao Yang"), "2402.13929"),
    Paper("add", "Adversarial Diffusion Distillation", ("Axel Sauer", "Dominik Lorenz", "Andreas Blattmann", "Robin Rombach"), "2311.17042"),
    Paper("tcd", "Trajectory Consistency Distillation",
          ("Jianbin Zheng", "Minghui Hu", "Zhongyi Fan", "Chaoyue Wang", "Changxing Ding", "Dacheng Tao", "Tat-Jen Cham"), "2402.19159"),
    Paper("pcm", "Phased Consistency Model",
          ("Fu-Yun Wang", "Zhaoyang Huang", "Alexander William Bergman", "Dazhong Shen", "Peng Gao", "Michael Lingelbach", "Keqiang Sun", "Weikang Bian",
           "Guanglu Song", "Yu Liu", "Hongsheng Li", "Xiaogang Wang"), "2405.18407"),
    Paper("sana_sprint", "SANA-Sprint: One-Step Diffusion with Continuous-Time Consistency Distillation",
          ("Junsong Chen", "Shuchen Xue", "Yuyang Zhao", "Jincheng Yu", "Sayak Paul", "Junyu Chen", "Han Cai", "Enze Xie", "Song Han"), "2503.09641"),
    Paper("anyflow", "AnyFlow: Any-Step Video Diffusion Model with On-Policy Flow Map Distillation",
          ("Yuchao Gu", "Guian Fang", "Yuxin Jiang", "Weijia Mao", "Song Han", "Han Cai", "Mike Zheng Shou"), "2605.13724"),
)

# Commits at which the files of a row were seen, in listings of the repository (address + /tree/COMMIT) unless a line says otherwise.
COMMITS = {
    "SimianLuo/LCM_Dreamshaper_v7": "786fa1a98953cac843f9a83b368ac0d00bacd279",
    "latent-consistency/lcm-sdxl": "843cb4058e2bb79edc70a6d8002e1a96feddfd14",
    "latent-consistency/lcm-lora-sdv1-5": "cf2fced511dbe7e26c8d1d397e728fbab875db4b",
    "latent-consistency/lcm-lora-sdxl": "e4f4bc876032ad70aa9d241af2a2f33db0f3f048",
    "latent-consistency/lcm-lora-ssd-1b": "857c372dbe0edd8af6255638a68d0d7ccb7a3d76",
    "tianweiy/DMD2": "be22767697a1f3ca656b73c776e15fa335c86c6c",                     # adds the safetensors of the UNet; after the LoRA's repair
    "ByteDance/Hyper-SD": "52d483a2ab8d38ce89e1d8b8f45771905f3af3f4",
    "ByteDance/SDXL-Lightning": "dd8c2216059e9d3096313bfcb53bdfff80f70c77",
    "stabilityai/sdxl-turbo": "d5f666b87644284177f7da3949bef4a9effbfb5d",
    "stabilityai/sd-turbo": "6320d118440daa531996d634045c9f0643b44822",
    "h1t/TCD-SDXL-LoRA": "ea69e290a201cbb9ac232be2d5c81ef6dc0fc3a2",
    "h1t/TCD-SD15-LoRA": "449a99f6bbded2bdbbc66386b2a4fbf8db8d3807",                 # its history: the upload of the whole folder
    "wangfuyun/PCM_Weights": "39560fead4ce00f94db3cb8e93dd8fba90ec0be6",
    "black-forest-labs/FLUX.1-schnell": "e7e89706ff31c2fbf4ee941e2b20144c908f772f",  # its history: after the diffusers folders were added
    "Tongyi-MAI/Z-Image-Turbo": "f332072aa78be7aecdf3ee76d5c247082da564a6",          # named by huggingface.co/DownFlow/Z-Image-Turbo-Fuli, made of it
    "lightx2v/Qwen-Image-Lightning": "813e69cd4c5627f2c7b921667f79690a0e12bd4e",
}

LCM_DOCS = "https://github.com/huggingface/diffusers/blob/01337da7633c4c663e76e75550e6f9d94fa7dc97/docs/source/en/using-diffusers/inference_with_lcm.md"
DMD2_README = "https://github.com/tianweiy/DMD2/blob/01f37a889dd347cb32bd124989bc12e0349ac7b2/README.md"
HYPER_CARD = HUB + "ByteDance/Hyper-SD/blob/0d30c24b74c11f3d13dcd56c4689f80b7ebe45cf/README.md"
# Two texts: the FLUX licence for what is made of FLUX.1-dev, and for the rest the OpenRAIL++ one that the card named until commit 2e3ed1a.
HYPER_LICENSE = HUB + "ByteDance/Hyper-SD/blob/52d483a2ab8d38ce89e1d8b8f45771905f3af3f4/LICENSE.md"
HYPER_FILES = HUB + "ByteDance/Hyper-SD/tree/52d483a2ab8d38ce89e1d8b8f45771905f3af3f4"
LIGHTNING_CARD = HUB + "ByteDance/SDXL-Lightning"
LIGHTNING_FILES = HUB + "ByteDance/SDXL-Lightning/tree/dd8c2216059e9d3096313bfcb53bdfff80f70c77"
TURBO_DOCS = "https://github.com/huggingface/diffusers/blob/1d991e83bfbedf4d537192b74fc49fb2de40cdbf/docs/source/en/using-diffusers/sdxl_turbo.md"
TCD_README = "https://github.com/jabir-zheng/TCD/blob/1d1566df1e5155cce5c35016064a12e374ff9d87/README.md"
TDM_README = "https://github.com/Luo-Yihong/TDM/blob/81b019f91539948d49da86cef12ccc64030c5022/README.md"
SPRINT_DOCS = "https://github.com/huggingface/diffusers/blob/28ef0165b91948a8ba9fabc8e993eb11f4c78a58/docs/source/en/api/pipelines/sana_sprint.md"
FLUX_DOCS = "https://github.com/huggingface/diffusers/blob/01b6b66267ac746e63c22fa28bde214a3e721aec/docs/source/en/api/pipelines/flux.md"
ZIMAGE_README = "https://github.com/Tongyi-MAI/Z-Image/blob/44314b8e1f637a40e8b244fd3fe24ba64925de05/README.md"
QWEN_DOCS = "https://github.com/huggingface/diffusers/blob/00eaa475ca1a5f112c0d20413115347ecc0c71e2/docs/source/en/api/pipelines/qwenimage.md"
QWEN_README = "https://github.com/ModelTC/Qwen-Image-Lightning/blob/0351270ff8549e57f30871c67a544063b6dbbea2/README.md"
ANYFLOW_DOCS = "https://github.com/huggingface/diffusers/blob/0aea63ffb8ce7e13ea0790bbe305b37d8a7bae74/docs/source/en/api/pipelines/anyflow.md"
WAN_README = "https://github.com/ModelTC/Wan2.2-Lightning/blob/27175501c2b743c6e0a32a5bc86da4efe81f59b5/README.md"
KLEIN_README = "https://github.com/black-forest-labs/flux2/blob/f72e0dc36402d814546ed8f1331598bcc3d38735/README.md"

TRAILING = {"timestep_spacing": "trailing"}
# Distilled with shift 3 whatever the size of the picture: both ends of the dynamic shift are log 3.
QWEN_SHIFT = {"base_image_seq_len": 256, "base_shift": 1.0986122886681098, "invert_sigmas": False, "max_image_seq_len": 8192, "max_shift": 1.0986122886681098,
              "num_train_timesteps": 1000, "shift": 1.0, "shift_terminal": None, "stochastic_sampling": False, "time_shift_type": "exponential",
              "use_beta_sigmas": False, "use_dynamic_shifting": True, "use_exponential_sigmas": False, "use_karras_sigmas": False}


def row(name: str, method: str, teacher: str, source: str, steps: tuple[int, ...], license: str, **fields) -> Student:
    """A community row: float16 on a GPU and the base model's licence unless it says otherwise; its note says what is not known of it."""
    defaults = {"kind": "community", "base_license": BASE_LICENSES.get(teacher, "unknown"), "dtype": "float16", "status": "verified",
                "revision": COMMITS.get(source, "main")}
    merged = defaults | fields
    notes = [merged.get("note"), "licence not verified: no source read here states it" if license == "unknown" else "",
             "opened at its newest commit: no source read here names one" if merged["revision"] == "main" else ""]
    return Student(name, method, teacher, source, steps, license, **(merged | {"note": "; ".join(filter(None, notes))}))


def lcm_lora(tag: str, teacher: str, pipeline: str) -> Student:
    """2 to 8 steps; the cards say: no guidance, or a scale between 1 and 2."""
    repo = f"latent-consistency/lcm-lora-{tag}"
    return row(f"lcm-lora.{tag.replace('v1-5', '15')}", "lcm", teacher, repo, (8, 7, 6, 5, 4, 3, 2), "openrail++", parts="lora",
               file="pytorch_lora_weights.safetensors",
               pipeline=pipeline, scheduler="LCMScheduler", default_steps=4, guidance=1.0, guidance_range=(0.0, 2.0), paper="lcm_lora",
               variant="" if tag == "sdv1-5" else "fp16", facts=(HUB + repo, LCM_DOCS))


def hyper(tag: str, teacher: str, file: str, steps: tuple[int, ...], **fields) -> Student:
    defaults = {"parts": "lora", "license": "openrail++", "guidance": 0.0, "facts": (HYPER_CARD, HYPER_FILES, HYPER_LICENSE)}
    if teacher == SDXL:
        defaults |= {"pipeline": "StableDiffusionXLPipeline", "variant": "fp16"}
    elif teacher == SD15:
        defaults |= {"pipeline": "StableDiffusionPipeline"}
    merged = defaults | fields
    return row(f"hyper-sd.{tag}", "tscd", teacher, "ByteDance/Hyper-SD", steps, merged.pop("license"), file=file, **merged)


def lightning(steps: int, lora: bool = False) -> Student:
    """A file for each step count; the one-step network predicts x0."""
    one = steps == 1
    file = "sdxl_lightning_1step_unet_x0" if one else f"sdxl_lightning_{steps}step_{'lora' if lora else 'unet'}"
    return row(f"sdxl-lightning.{steps}step{'-lora' if lora else ''}", "lightning", SDXL, "ByteDance/SDXL-Lightning", (steps,), "openrail++",
               parts="lora" if lora else "component", component="" if lora else "unet", file=f"{file}.safetensors",
               pipeline="StableDiffusionXLPipeline", variant="fp16",
               scheduler="EulerDiscreteScheduler", scheduler_config=TRAILING | ({"prediction_type": "sample"} if one else {}), guidance=0.0,
               facts=(LIGHTNING_CARD, LIGHTNING_FILES))


def qwen(steps: int, version: str) -> Student:
    return row(f"qwen-image-lightning.{steps}step", "undisclosed", QWEN, "lightx2v/Qwen-Image-Lightning", (steps,), "apache-2.0", parts="lora",
               file=f"Qwen-Image-Lightning-{steps}steps-{version}.safetensors", pipeline="QwenImagePipeline", scheduler="FlowMatchEulerDiscreteScheduler",
               scheduler_config=QWEN_SHIFT, scheduler_alone=True, guidance=1.0, guidance_argument="true_cfg_scale", dtype="bfloat16",
               facts=(QWEN_DOCS, QWEN_README))


def anyflow(size: str) -> Student:
    """One checkpoint for any number of steps; guidance is part of the weights."""
    repo = f"nvidia/AnyFlow-Wan2.1-T2V-{size}-Diffusers"
    return row(f"anyflow.wan2.1-t2v-{size.lower()}", "anyflow", f"Wan-AI/Wan2.1-T2V-{size}-Diffusers", repo, (16, 8, 4, 2, 1), "other", default_steps=4,
               pipeline="AnyFlowPipeline", guidance=1.0, dtype="bfloat16", modality="video", status="unverified",
               facts=(ANYFLOW_DOCS, HUB + repo + "/blob/main/README.md", HUB + "nvidia/AnyFlow-Wan2.1-T2V-14B-Diffusers/blob/main/model_index.json"),
               note="diffusers' documentation opens it with AnyFlowPipeline, but the model_index.json that was read names classes of its authors' "
                    "package (far), which stock diffusers refuses; its card says licence `other` and names none")


ROWS = (
    # ------------------------------------------------------------------------------------------- latent consistency models
    row("lcm.dreamshaper-v7", "lcm", "Lykon/dreamshaper-7", "SimianLuo/LCM_Dreamshaper_v7", (8, 7, 6, 5, 4, 3, 2, 1), "mit",
        pipeline="LatentConsistencyModelPipeline",
        scheduler="LCMScheduler", scheduler_config={"original_inference_steps": 50}, default_steps=4, guidance=8.0,
        guidance_range=(1.0, 13.0),
        facts=("https://github.com/luosiallen/latent-consistency-model/blob/03e79f1324b9e2fae17a3c098f4c9cfc4338262a/README.md",
               HUB + "SimianLuo/LCM_Dreamshaper_v7/tree/786fa1a98953cac843f9a83b368ac0d00bacd279", LCM_DOCS)),
    row("lcm.sdxl", "lcm", SDXL, "latent-consistency/lcm-sdxl", (8, 7, 6, 5, 4, 3, 2), "openrail++", parts="component", component="unet",
        pipeline="StableDiffusionXLPipeline",
        variant="fp16", scheduler="LCMScheduler", default_steps=4, guidance=8.0, guidance_range=(1.0, 13.0),
        facts=(LCM_DOCS, HUB + "latent-consistency/lcm-sdxl")),
    lcm_lora("sdv1-5", SD15, "StableDiffusionPipeline"),
    lcm_lora("sdxl", SDXL, "StableDiffusionXLPipeline"),
    lcm_lora("ssd-1b", "segmind/SSD-1B", "StableDiffusionXLPipeline"),
    # ------------------------------------------------------------------------------------------------------------- DMD2
    # original_inference_steps=4 makes LCMScheduler's own grid the trained one, [999, 749, 499, 249]; its default is another.
    row("dmd2.sdxl-4step", "dmd", SDXL, "tianweiy/DMD2", (4,), "cc-by-nc-4.0", parts="component", component="unet",
        file="dmd2_sdxl_4step_unet_fp16.safetensors",
        pipeline="StableDiffusionXLPipeline", variant="fp16", scheduler="LCMScheduler", scheduler_config={"original_inference_steps": 4},
        timesteps={4: (999, 749, 499, 249)}, guidance=0.0,
        metrics=(Metric("FID", 19.32, 4, "COCO 2014", "https://github.com/tianweiy/DMD2/blob/main/experiments/sdxl/README.md"),),
        facts=(DMD2_README, HUB + "tianweiy/DMD2/commits/main/dmd2_sdxl_4step_unet_fp16.safetensors",
               HUB + "tianweiy/DMD2/commit/be22767697a1f3ca656b73c776e15fa335c86c6c")),
    row("dmd2.sdxl-4step-lora", "dmd", SDXL, "tianweiy/DMD2", (4,), "cc-by-nc-4.0", parts="lora", file="dmd2_sdxl_4step_lora_fp16.safetensors",
        pipeline="StableDiffusionXLPipeline", variant="fp16", scheduler="LCMScheduler", scheduler_config={"original_inference_steps": 4},
        timesteps={4: (999, 749, 499, 249)}, guidance=0.0, lora_scale=1.0,
        facts=(DMD2_README, HUB + "tianweiy/DMD2/commit/552f138d6c8be8c407eea76d4159cfcfafa1e167", HUB + "tianweiy/DMD2/commits/main")),
    row("dmd2.sdxl-1step", "dmd", SDXL, "tianweiy/DMD2", (1,), "cc-by-nc-4.0", parts="component", component="unet", file="dmd2_sdxl_1step_unet_fp16.bin",
        pipeline="StableDiffusionXLPipeline", variant="fp16", scheduler="LCMScheduler", timesteps={1: (399,)}, guidance=0.0,
        facts=(DMD2_README, HUB + "tianweiy/DMD2/tree/be22767697a1f3ca656b73c776e15fa335c86c6c"), note="published as a pickle only"),
    # --------------------------------------------------------------------------------------------------------- Hyper-SD
    *(hyper(f"{tag}-{n}step", base, f"Hyper-{file}-{n}steps-lora.safetensors", (n,), scheduler="DDIMScheduler", scheduler_config=TRAILING)
      for tag, base, file in (("sdxl", SDXL, "SDXL"), ("sd15", SD15, "SD15")) for n in (2, 4, 8)),
    *(hyper(f"{tag}-unified", base, f"Hyper-{file}-1step-lora.safetensors", (8, 7, 6, 5, 4, 3, 2, 1), scheduler="TCDScheduler", default_steps=1,
            call={"eta": 1.0},
            note="lower eta gives more detail at several steps") for tag, base, file in (("sdxl", SDXL, "SDXL"), ("sd15", SD15, "SD15"))),
    hyper("sdxl-1step", SDXL, "Hyper-SDXL-1step-Unet.safetensors", (1,), parts="component", component="unet", scheduler="LCMScheduler",
          timesteps={1: (800,)}),
    *(hyper(f"sd3-{n}step", SD3, f"Hyper-SD3-{n}steps-CFG-lora.safetensors", (n,), guidance=w, lora_scale=0.125, pipeline="StableDiffusion3Pipeline",
            note="the licence of its base model holds too",
            facts=(HYPER_CARD, HYPER_FILES, HYPER_LICENSE, "https://github.com/design-technology/S2F-AI-ScriptEditor (Hyper_testing/03_sd3-8-hyper.py)"))
      for n, w in ((4, 3.0), (8, 5.0), (16, 7.0))),
    *(hyper(f"flux-{n}step", FLUX, f"Hyper-FLUX.1-dev-{n}steps-lora.safetensors", (n,), license="flux-1-dev-non-commercial-license", guidance=3.5,
            lora_scale=0.125,
            pipeline="FluxPipeline", dtype="bfloat16") for n in (8, 16)),
    # ----------------------------------------------------------------------------------------------------- SDXL-Lightning
    *(lightning(n) for n in (1, 2, 4, 8)),
    *(lightning(n, lora=True) for n in (2, 4, 8)),
    # -------------------------------------------------------------------------------------------------------------- Turbo
    row("sdxl-turbo", "add", SDXL, "stabilityai/sdxl-turbo", (4, 3, 2, 1), "sai-nc-community", pipeline="StableDiffusionXLPipeline", variant="fp16",
        scheduler="EulerAncestralDiscreteScheduler", scheduler_config=TRAILING, default_steps=1, guidance=0.0,
        facts=(TURBO_DOCS, HUB + "stabilityai/sdxl-turbo/tree/d5f666b87644284177f7da3949bef4a9effbfb5d")),
    row("sd-turbo", "add", SD21, "stabilityai/sd-turbo", (4, 3, 2, 1), "sai-nc-community", pipeline="StableDiffusionPipeline", variant="fp16",
        scheduler="EulerDiscreteScheduler", scheduler_config=TRAILING, default_steps=1, guidance=0.0, status="unverified",
        facts=(HUB + "stabilityai/sd-turbo/tree/6320d118440daa531996d634045c9f0643b44822", HUB + "stabilityai/sd-turbo/blame/main/LICENSE"),
        note="repository, files and licence checked; scheduler and guidance only by analogy with sdxl-turbo"),
    # ------------------------------------------------------------------------------------------------------------ TCD, PCM
    *(row(f"tcd.{tag}", "tcd", base, f"h1t/TCD-{repo}-LoRA", (8, 7, 6, 5, 4, 3, 2), "mit", parts="lora", file="pytorch_lora_weights.safetensors",
          pipeline=pipe, variant=variant,
          scheduler="TCDScheduler", default_steps=4, guidance=0.0, call={"eta": 0.3}, facts=(TCD_README, HUB + f"h1t/TCD-{repo}-LoRA"))
      for tag, base, repo, pipe, variant in (("sdxl", SDXL, "SDXL", "StableDiffusionXLPipeline", "fp16"),
                                             ("sd15", SD15, "SD15", "StableDiffusionPipeline", ""))),
    *(row(f"pcm.sdxl-{n}step", "pcm", SDXL, "wangfuyun/PCM_Weights", (n,), "unknown", parts="lora",
          file=f"sdxl/pcm_sdxl_smallcfg_{n}step_converted.safetensors",
          pipeline="StableDiffusionXLPipeline", variant="fp16", scheduler="TCDScheduler", scheduler_config=TRAILING, guidance=0.0,
          status="unverified",
          facts=("https://github.com/G-U-N/Phased-Consistency-Model", HUB + "spaces/radames/Phased-Consistency-Model-PCM"),
          note="files and settings are those of the demo the authors link; users also run DDIM and Euler with trailing steps") for n in (2, 4, 8)),
    # ----------------------------------------------------------------------------------------------------------------- TDM
    row("tdm.sd3-4step", "tdm", SD3, "Luo-Yihong/TDM_sd3_lora", (4,), "apache-2.0", parts="lora", pipeline="StableDiffusion3Pipeline", lora_scale=0.125,
        guidance=1.0,
        scheduler="DPMSolverMultistepScheduler", call={"negative_prompt": ""},
        scheduler_config={"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 6.0, "num_train_timesteps": 1000,
                          "algorithm_type": "dpmsolver++",
                          "solver_order": 2, "solver_type": "midpoint", "lower_order_final": True, "final_sigmas_type": "zero",
                          "timestep_spacing": "linspace"},
        scheduler_alone=True, status="unverified", facts=(TDM_README, HUB + "Luo-Yihong/TDM_sd3_lora/discussions"),
        note="scale, steps, guidance and flow_shift are the README's; the scheduler it copies from elsewhere is written out here, not compared"),
    row("tdm.dreamshaper-4step", "tdm", "Lykon/dreamshaper-7", "Luo-Yihong/TDM_dreamshaper_LoRA", (4,), "unknown", parts="lora", file="tdm_dreamshaper.pt",
        pipeline="StableDiffusionPipeline", scheduler="DPMSolverMultistepScheduler", guidance=1.0, status="unverified", facts=(TDM_README,),
        note="published as a pickle only"),
    # ----------------------------------------------------------------------------------------------------- whole pipelines
    *(row(f"sana-sprint.{size.lower()}", "scm", base, f"Efficient-Large-Model/Sana_Sprint_{size}_1024px_diffusers", (2,), "nscl-v2-custom",
          paper="sana_sprint", pipeline="SanaSprintPipeline", guidance=4.5, dtype="bfloat16",
          facts=(SPRINT_DOCS, HUB + f"Efficient-Large-Model/Sana_Sprint_{size}_1024px",
                 HUB + f"deAPI-ai/sanasprint{size[0]}{size[2]}b1024/blob/main/README.md"),
          metrics=(Metric("FID", fid, 2, "MJHQ-30K", "https://github.com/NVlabs/Sana/blob/main/docs/sana_sprint.md"),),
          note="other counts need the scheduler without intermediate_timesteps; licence: NVIDIA's (LICENSE.txt), by the card of the same weights in "
               "the original layout and a copy's")
      for size, base, fid in (("0.6B", "Efficient-Large-Model/Sana_600M_1024px_diffusers", 6.54),
                               ("1.6B", "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers", 6.50))),
    row("flux.1-schnell", "ladd", "FLUX.1 [pro]", "black-forest-labs/FLUX.1-schnell", (4, 3, 2, 1), "apache-2.0", base_license="not published",
        pipeline="FluxPipeline", guidance=0.0, dtype="bfloat16", call={"max_sequence_length": 256},
        facts=(FLUX_DOCS, HUB + "black-forest-labs/FLUX.1-schnell")),
    row("flux.2-klein-4b", "undisclosed", "black-forest-labs/FLUX.2-klein-base-4B", "black-forest-labs/FLUX.2-klein-4B", (4,), "apache-2.0",
        pipeline="Flux2KleinPipeline", guidance=1.0, dtype="bfloat16",
        facts=(KLEIN_README, HUB + "black-forest-labs/FLUX.2-klein-4B/blob/main/model_index.json"),
        note="is_distilled in its model_index.json switches guidance off whatever is passed"),
    # Nine steps of the scheduler are eight calls of the network: the last has no noise left to remove.
    row("z-image-turbo", "decoupled_dmd", "Tongyi-MAI/Z-Image", "Tongyi-MAI/Z-Image-Turbo", (9,), "apache-2.0", pipeline="ZImagePipeline", guidance=0.0,
        dtype="bfloat16", facts=(ZIMAGE_README,)),
    qwen(8, "V1.1"),
    qwen(4, "V1.0"),
    # --------------------------------------------------------------------------------------------------------------- video
    anyflow("1.3B"),
    anyflow("14B"),
    row("wan2.1-lightx2v.t2v-14b-4step", "dmd", "Wan-AI/Wan2.1-T2V-14B-Diffusers", "lightx2v/Wan2.1-Distill-Loras", (4,), "unknown", parts="lora",
        file="wan2.1_t2v_14b_lora_rank64_lightx2v_4step.safetensors", pipeline="WanPipeline", scheduler="UniPCMultistepScheduler",
        scheduler_config={"flow_shift": 5.0, "use_flow_sigmas": True, "prediction_type": "flow_prediction", "timestep_spacing": "trailing"}, guidance=1.0,
        dtype="bfloat16", modality="video", status="unverified",
        facts=(HUB + "lightx2v/Wan2.1-Distill-Loras/tree/main", HUB + "lightx2v/Wan2.1-T2V-14B-StepDistill-CfgDistill"),
        note="file, 4 steps and no guidance checked; solver and shift of a stock scheduler not"),
    row("wan2.2-lightning.t2v-a14b-4step", "dmd", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "lightx2v/Wan2.2-Lightning", (4,), "apache-2.0", parts="lora",
        file="Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1/high_noise_model.safetensors",
        second_file="Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1/low_noise_model.safetensors",
        pipeline="WanPipeline", scheduler="UniPCMultistepScheduler",
        scheduler_config={"flow_shift": 5.0, "use_flow_sigmas": True, "prediction_type": "flow_prediction", "timestep_spacing": "trailing"}, guidance=1.0,
        call={"guidance_scale_2": 1.0}, dtype="bfloat16", modality="video", status="unverified", facts=(WAN_README,),
        note="repository, folder, 4 steps and no guidance checked; solver and shift of a stock scheduler not"),
)

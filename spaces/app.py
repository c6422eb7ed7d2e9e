"""The Space: race a few-step student against its teacher.

    python spaces/app.py            # http://127.0.0.1:7860; no account, no network, students and teachers that are in the package

Environment: FEWSTEP_SPACE_STUDENTS names further students, `folder` or `folder=teacher`, separated as PATH is;
FEWSTEP_SPACE_MEMORY_GB bounds the weights kept in memory; FEWSTEP_SPACE_DISTIL=0 hides the training tab; README.md has all of them;
GRADIO_SERVER_NAME and GRADIO_SERVER_PORT say where to listen.

A tab is a function below `@tabs.tab(...)` in tabs.py: the page asks each whether it applies here and builds those that do."""
from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

HERE = Path(__file__).resolve().parent
for place in (HERE, *([HERE.parent] if (HERE.parent / "zoo").is_dir() else [])):     # zoo is beside this file in a pushed Space, above it in a clone
    if str(place) not in sys.path:
        sys.path.append(str(place))
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gpu  # noqa: E402, F401   before gradio: see there

import gradio as gr  # noqa: E402

import api  # noqa: E402
import tabs  # noqa: E402

HEADER = """<header class="fs-header"><div><p class="fs-brand"><svg viewBox="0 0 32 32" width="26" height="26" aria-hidden="true"><rect class="a" x="2" y="20" width="28" height="7" rx="2"/>
<rect class="b" x="11" y="12" width="19" height="7" rx="2"/><rect class="c" x="20" y="4" width="10" height="7" rx="2"/></svg> Fewstep</p>
<h1>Race the teacher</h1></div>
<p>A diffusion model draws in dozens of network calls. A student distilled from it needs one to four. Same noise, same clock: see what that buys and what it costs.</p></header>"""
THEME = gr.themes.Base(primary_hue="orange", neutral_hue="stone", radius_size="sm", font=["ui-sans-serif", "system-ui", "Segoe UI", "Helvetica Neue", "Arial", "sans-serif"],
                       font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"])


def page() -> gr.Blocks:
    """The whole page, not yet served."""
    with gr.Blocks(title="Fewstep: race the teacher", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as demo:
        gr.HTML(HEADER, elem_id="fs-head")
        wish = tabs.panel()
        with gr.Tabs(elem_id="fs-tabs", overflow_behavior="wrap") as shelf:
            made = [(tab, tabs.place(tab, wish, shelf, demo)) for tab in tabs.TABS if tab.applies()]
        tabs.connect(demo, wish, shelf, dict((tab.id, item) for tab, item in made))
        api.endpoints()
    return demo


def serve(**options):
    """Launch the page; options as for gradio's `launch`."""
    tabs.cache_examples()
    demo = page().queue(max_size=40, default_concurrency_limit=4)
    return demo, demo.launch(theme=THEME, css_paths=[HERE / "style.css"], favicon_path=HERE / "favicon.svg", ssr_mode=False, footer_links=["api"], quiet=True, **options)


def heed():
    """A service manager's word, or a terminal that closes, ends the page as Ctrl-C does: a training that was started here ends with it."""
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):            # no SIGHUP on Windows
            signal.signal(getattr(signal, name), lambda *_: sys.exit(0))


if __name__ == "__main__":
    heed()
    _, (_, url, _) = serve(prevent_thread_lock=True)
    print(f"the page is at {url}", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        pass

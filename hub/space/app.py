"""AlignGPT in a browser: ask about an image, and see what its answer is made of. `python app.py`."""

import os


# read when gradio is imported
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import answers
import gradio as gr
from images import MAX_FILE_BYTES
from page import HERE, QUEUE, build_page
from starlette.middleware import Middleware


# Nothing from other hosts: the page works without a network, and an answer cannot make a browser fetch anything
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' data: blob:; connect-src 'self'; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'"
)


class ContentPolicy:
    """Sends the content security policy with every answer of the server."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy if scope["type"] == "http" else send)


def main(model_id: str | None = None, revision: str | None = None, host: str | None = None, port: int | None = None):
    """
    Loads the model and serves the page until it is stopped.

    Args:
        model_id, revision: see `answers.load`.
        host, port: where to listen; gradio's choice (and GRADIO_SERVER_NAME, GRADIO_SERVER_PORT) without.
    """
    page = build_page(answers.load(model_id, revision))
    page.queue(max_size=QUEUE, default_concurrency_limit=1)
    font = ["system-ui", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"]
    page.launch(
        server_name=host,
        server_port=port,
        theme=gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=font, font_mono=["monospace"]),
        css_paths=HERE / "style.css",
        max_file_size=MAX_FILE_BYTES,
        # no file but uploads and what was made of them
        allowed_paths=[],
        blocked_paths=[str(HERE)],
        show_error=True,
        ssr_mode=False,
        footer_links=["api"],
        # the Hub's page around a Space brings its own
        app_kwargs={} if os.environ.get("SPACE_ID") else {"middleware": [Middleware(ContentPolicy)]},
    )


if __name__ == "__main__":
    main()

"""The web page of ``atlas-diffusers app``; needs Gradio, of the extra `app`."""

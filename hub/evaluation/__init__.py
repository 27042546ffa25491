"""The paper's twelve benchmarks: how each is asked, judged and scored (`aligngpt evaluate`)."""

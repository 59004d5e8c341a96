"""The request of `moecluster generate`: command-line options override settings."""

from moecluster.cli.commands.generate import given_options, with_defaults
from moecluster.config.sections import ServeConfig

SERVE = ServeConfig(max_new_tokens=7, temperature=0.5, top_p=0.9, seed=3)


def test_settings_apply_where_no_option_is_given() -> None:
    assert with_defaults(given_options(None, None, None, None, None, None), SERVE) == {
        "max_new_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
    }


def test_an_option_overrides_its_setting() -> None:
    asked = with_defaults(given_options(9, 0.0, None, 5, None, ("\n",)), SERVE)
    assert asked == {"max_new_tokens": 9, "temperature": 0.0, "top_p": 0.9, "seed": 3, "top_k": 5, "stop": ("\n",)}

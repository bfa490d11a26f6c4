"""``completion``: what a shell needs to complete commands and options, written from the parser itself."""

import argparse

EXAMPLES = """examples:
  eval "$(atlas-diffusers completion bash)"                                    in ~/.bashrc, or zsh: in ~/.zshrc
  atlas-diffusers completion fish > ~/.config/fish/completions/atlas-diffusers.fish
"""
BASH = """_atlas_diffusers() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" command="" known="{commands}"
  for given in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    case " {commands} " in *" $given "*) command="$given"; break;; esac
  done
  case "$command" in
{cases}
  esac
  if [[ -z "$command" || "$word" == -* ]]; then
    COMPREPLY=($(compgen -W "$known" -- "$word"))
  else
    COMPREPLY=($(compgen -f -W "$known" -- "$word"))
  fi
}}
complete -o filenames -F _atlas_diffusers atlas-diffusers
"""


def add_completion_command(commands: argparse._SubParsersAction, parser: argparse.ArgumentParser) -> None:
    """Add ``completion`` to the subcommands of a parser, all of which it completes."""
    completion = commands.add_parser(
        "completion",
        help="completion of commands and options in a shell",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))
    completion.set_defaults(run=lambda args: print(script(parser, args.shell), end=""))


def words(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """Of every command, by name, its options and subcommands."""
    return {name: _options(command) for name, command in _subcommands(parser).items()}


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """What ``shell`` reads; zsh takes bash's."""
    known, helps = words(parser), _helps(parser)
    if shell == "fish":
        lines = ["complete -c atlas-diffusers -n __fish_use_subcommand -f"]
        for name, options in known.items():
            lines.append(f"complete -c atlas-diffusers -n __fish_use_subcommand -a {name} -d '{helps.get(name, '')}'")
            seen = f"'__fish_seen_subcommand_from {name}'"
            lines += [f"complete -c atlas-diffusers -n {seen} -l {o[2:]}" for o in options if o.startswith("--")]
            lines += [f"complete -c atlas-diffusers -n {seen} -a {o}" for o in options if not o.startswith("-")]
        return "\n".join(lines) + "\n"
    cases = "\n".join(f'    {name}) known="{" ".join(options)}";;' for name, options in known.items())
    text = BASH.format(commands=" ".join(known), cases=cases)
    return f"autoload -U +X bashcompinit && bashcompinit\n{text}" if shell == "zsh" else text


def _subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return {name: command for action in actions for name, command in action.choices.items()}


def _options(parser: argparse.ArgumentParser) -> list[str]:
    found = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    for name, command in _subcommands(parser).items():
        found += [name, *_options(command)]
    return list(dict.fromkeys(found))


def _helps(parser: argparse.ArgumentParser) -> dict[str, str]:
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return {choice.dest: (choice.help or "").replace("'", "") for action in actions for choice in action._choices_actions}

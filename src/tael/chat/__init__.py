"""`tael chat` and `tael complete` in the terminal.

`Conversation` knows the talk and its settings and how an answer comes apart; `Reply` what an answer took; `command`
carries out what begins with a slash; `Screen` shows it all; `talk` reads lines until there are no more.
"""

from tael.chat.commands import COMMANDS, command
from tael.chat.conversation import Conversation, Piece
from tael.chat.reply import Reply
from tael.chat.screen import Screen, printable
from tael.chat.session import talk

__all__ = ["COMMANDS", "Conversation", "Piece", "Reply", "Screen", "command", "printable", "talk"]

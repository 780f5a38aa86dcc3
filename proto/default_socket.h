// Where quarryd serves and its clients look, unless they are told otherwise.
#pragma once

#include <string>

namespace quarry {

// $XDG_RUNTIME_DIR/quarry for an ordinary user who has such a directory, else /run/quarry.
std::string DefaultSocketDirectory();
// The shared-memory socket, in that directory.
std::string DefaultSocket();

}  // namespace quarry

#include "proto/identity.h"

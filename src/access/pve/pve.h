/* The backend made of Proxmox' own commands. */
#ifndef PBA_PVE_H
#define PBA_PVE_H

#include "src/access/access.h"

/* Looks at everything that can be looked at, and changes nothing. */
bool pba_pve_check(PbaAccess *access, const PbaBlock *block, GError **error);
/* Starts the NBD server, too; begins the changes before its first one. Teardown undoes what it did.
 */
bool pba_pve_setup(PbaAccess *access, GError **error);
/* The exports are gone before. */
bool pba_pve_teardown(PbaAccess *access, bool success, GError **error);

/* The name of this target's bitmaps. */
const char *pba_pve_bitmap_name(const PbaAccess *access);

#endif

/* The backend made of Proxmox' own commands. */
#ifndef PBA_PVE_H
#define PBA_PVE_H

#include "src/access/backend.h"

extern const PbaBackend pba_pve_backend;

/* In this QEMU records what the guest writes while an access with bitmaps is up. */
#define PBA_PVE_BACKGROUND "backup-access-background-bitmap"

/* The table's */
bool pba_pve_check(PbaAccess *access, const PbaBlock *block, GError **error);
bool pba_pve_setup(PbaAccess *access, PbaBlock *block, GError **error);
bool pba_pve_teardown(PbaAccess *access, bool success, GError **error);

/* The name of this target's bitmaps. */
const char *pba_pve_bitmap_name(const PbaAccess *access);

#endif

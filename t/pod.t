# POD has the right form, and describes every public function.

use v5.36;

use Test::More;

eval { require Test::Pod; require Test::Pod::Coverage; 1 }
    or plan(skip_all => 'no Test::Pod and Test::Pod::Coverage');

my @modules = qw(
    PVE::BackupAccess PVE::BackupAccess::Volume PVE::BackupAccess::Error PVE::BackupAccess::Task
    PVE::BackupAccess::GuestAgent PVE::BackupAccess::Image PVE::BackupAccess::Libvirt
    PVE::BackupAccess::Retention PVE::BackupAccess::Provider::Qcow2Chain PVE::BackupAccess::Provider::RBD
);

Test::Pod::pod_file_ok($_) for Test::Pod::all_pod_files('lib');
Test::Pod::Coverage::pod_coverage_ok($_, { also_private => [qr/\A(?:CLONE_SKIP|DESTROY)\z/] })
    for @modules;

sub pod_of ($module) {
    my $file = $INC{ $module =~ s!::!/!gr . '.pm' };
    open(my $fh, '<', $file) or die "$file: $!\n";
    local $/ = undef;
    return <$fh> =~ s/\A.*?(?=^=head1)//msr;
}

# What the section of a method lacks. Examples and errors that several methods share may be in other sections.
sub lacks ($pod, $method, $section) {
    my $code = join("\n", $pod =~ m/^ {4,}.*/mg);
    my $common = qr/^=head1 ERRORS$|\bMethods die with a L<PVE::BackupAccess::Error>: C</m;
    return (
        ($section =~ m/\b(?:[Tt]akes|arguments|options are)\b/ ? () : 'arguments'),
        ($section =~ m/[Tt]akes no\s+arguments|\bErrors:/ || $pod =~ $common ? () : 'errors'),
        ($code =~ m/->$method\b|\b$method\(/ ? () : 'an example'),
    );
}

for my $module (@modules) {
    my $pod = pod_of($module);
    my @problems;
    for my $section (split(m/^(?==head[12] )/m, $pod)) {
        my ($method) = $section =~ m/\A=head2 (\w+)$/m or next;
        my @lacks = $module->can($method) ? lacks($pod, $method, $section) : ();
        push(@problems, "$method: " . join(', ', @lacks)) if @lacks;
    }
    is_deeply(\@problems, [], "$module: each method has arguments, errors and an example");
}
done_testing;
